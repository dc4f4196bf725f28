"""The jobs from end to end: plant a victim, inspect, purify or evaluate a model, verify a cure, prepare an attack.

The command line calls these. A job is a frozen dataclass of what the user says; `run` does it and returns the record.
"""

from hf_nft.workflows.attack_job import AttackJob
from hf_nft.workflows.evaluate_job import EvaluateJob
from hf_nft.workflows.inspect_job import Inspection, InspectJob
from hf_nft.workflows.job import Job
from hf_nft.workflows.plant_job import PlantJob
from hf_nft.workflows.purify_job import Case, PurifyJob, doubts_of, draw_shots
from hf_nft.workflows.verify_job import Verification, VerifyJob

__all__ = [
    "AttackJob",
    "Case",
    "EvaluateJob",
    "InspectJob",
    "Inspection",
    "Job",
    "PlantJob",
    "PurifyJob",
    "Verification",
    "VerifyJob",
    "doubts_of",
    "draw_shots",
]
