"""The jobs from end to end: plant a victim, purify a suspect, evaluate a model, prepare an attack.

The command line calls these. A job is a frozen dataclass of what the user says; `run` does it and returns the record.
"""

from hf_nft.workflows.attack_job import AttackJob
from hf_nft.workflows.evaluate_job import EvaluateJob
from hf_nft.workflows.job import Job
from hf_nft.workflows.plant_job import PlantJob
from hf_nft.workflows.purify_job import Case, PurifyJob, doubts_of, draw_shots

__all__ = ["AttackJob", "Case", "EvaluateJob", "Job", "PlantJob", "PurifyJob", "doubts_of", "draw_shots"]
