"""InstructGPT (Ouyang et al. 2022) as thin subclasses of TRL's trainers."""
