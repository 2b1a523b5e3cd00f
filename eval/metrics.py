"""
The metrics of InstructGPT's Appendix D with the interface of the library `evaluate`, as in
`Drop().compute(predictions=texts, references=lists_of_texts)`. BLEU, ROUGE-L and DROP's rules are those of sacrebleu,
rouge-score and lm-evaluation-harness; SQuAD's, which no library at hand has any more, are written down here.

`of_each(predictions, references)` gives the figures of single samples, of which intervals are made. BLEU has none.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import List as ListOf

NO_ANSWER = "Not in background."
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles, cut at white space [SQuAD v2 `normalize_answer`]."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def squad_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """
    Exact match and F1, 0 to 1, of one answer against the best of the accepted ones, by SQuAD v2's rules: an accepted
    answer that normalises to nothing does not count, and no accepted answer is the empty one. Where either side is
    empty both figures say whether both are.

    Source: https://worksheets.codalab.org/rest/bundles/0x6b567e1cf2e041ec80d7098f031c5c9e/contents/blob/ (official
    evaluate-v2.0.py), `get_raw_scores`.
    """
    said = squad_words(prediction)
    accepted = [words for words in map(squad_words, answers) if words] or [[]]
    return float(said in accepted), max(_f1(said, words) for words in accepted)


def _f1(said: list[str], accepted: list[str]) -> float:
    if not said or not accepted:
        return float(said == accepted)
    common = sum((Counter(said) & Counter(accepted)).values())
    return 2 * common / (len(said) + len(accepted))  # 2 p r / (p + r)


class _OfTexts(evaluate.Metric):
    """A metric of predicted texts, each with a list of accepted ones."""

    description = ""
    citation = ""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description="predictions: texts; references: for each a list of accepted texts",
            features=Features({"predictions": Value("string"), "references": ListOf(Value("string"))}),
        )

    def of_each(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        """Figures of each sample, by name."""
        raise NotImplementedError

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {name: float(np.mean(found)) for name, found in self.of_each(predictions, references).items()}


class SquadV2(_OfTexts):
    """F1 and exact match, 0 to 100, by SQuAD v2's rules; "Not in background." is the empty answer on both sides."""

    description = "SQuAD v2's F1 and exact match, with InstructGPT's words for no answer"
    citation = "Rajpurkar, Jia, Liang (2018), Know What You Don't Know"

    def of_each(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        found = [
            squad_scores(_answer(said), [_answer(one) for one in accepted])
            for said, accepted in zip(predictions, references, strict=True)
        ]
        return {"f1": [100 * f1 for _, f1 in found], "em": [100 * em for em, _ in found]}


def _answer(text: str) -> str:
    return "" if text.strip() == NO_ANSWER else text


class Drop(_OfTexts):
    """F1 and exact match, 0 to 100, by DROP's official rules, of the accepted answer that is met best."""

    description = "DROP's F1 and exact match"
    citation = "Dua et al. (2019), DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning"

    def of_each(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        from lm_eval.tasks.drop.utils import process_results

        found = [
            process_results({"answers": [(one,) for one in accepted]}, [said])
            for said, accepted in zip(predictions, references, strict=True)
        ]
        return {name: [100 * float(one[name]) for one in found] for name in ("f1", "em")}


class RougeL(_OfTexts):
    """ROUGE-L's F1, 0 to 1, without stemming, of the reference that is met best."""

    description = "ROUGE-L (F1)"
    citation = "Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries"

    def of_each(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        from rouge_score.rouge_scorer import RougeScorer

        score = RougeScorer(["rougeL"]).score_multi
        return {
            "rougeL": [
                score(list(accepted), said)["rougeL"].fmeasure
                for said, accepted in zip(predictions, references, strict=True)
            ]
        }


class Bleu(_OfTexts):
    """
    sacreBLEU's corpus BLEU, 0 to 100, with its defaults, as samples and references stand. It is not a mean: `counts`
    gives what is added up over samples, and `of_counts` the figure of a sum.
    """

    description = "corpus BLEU"
    citation = "Post (2018), A Call for Clarity in Reporting BLEU Scores"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"bleu": self.of_counts(self.counts(predictions, references).sum(0))}

    @staticmethod
    def counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(samples, 10): words of sample and reference, and n-grams that are met and that there are, of 1 to 4."""
        from sacrebleu import BLEU

        bleu = BLEU()
        found = [bleu.corpus_score([p], [[r] for r in of]) for p, of in zip(predictions, references, strict=True)]
        return np.array([[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in found])

    @staticmethod
    def of_counts(counts: np.ndarray) -> float:
        from sacrebleu import BLEU

        of_sample, of_reference, *ngrams = (int(count) for count in counts)
        return BLEU.compute_bleu(ngrams[:4], ngrams[4:], of_sample, of_reference, smooth_method="exp").score
