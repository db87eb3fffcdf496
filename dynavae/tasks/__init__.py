"""What a fitted model is for: score, filter, smooth, reconstruct, generate, forecast, impute, stream.

Each is the one time loop with another choice of what is observed, where z comes from and whether
particles are resampled. Batch-first in and out; results do not depend on the batch size.
"""

from dynavae.tasks.capabilities import TASKS, capabilities, require
from dynavae.tasks.export import StepInputs, export_step, step_inputs
from dynavae.tasks.latents import Latents, filter, smooth
from dynavae.tasks.predicted import Predicted
from dynavae.tasks.prediction import (
    Forecast,
    Generated,
    Imputation,
    Reconstruction,
    forecast,
    generate,
    impute,
    reconstruct,
)
from dynavae.tasks.scoring import Score, crps, score
from dynavae.tasks.stream_state import StreamState
from dynavae.tasks.streaming import Step, Stream

__all__ = [
    "TASKS",
    "Forecast",
    "Generated",
    "Imputation",
    "Latents",
    "Predicted",
    "Reconstruction",
    "Score",
    "Step",
    "StepInputs",
    "Stream",
    "StreamState",
    "capabilities",
    "crps",
    "export_step",
    "filter",
    "forecast",
    "generate",
    "impute",
    "reconstruct",
    "require",
    "score",
    "smooth",
    "step_inputs",
]
