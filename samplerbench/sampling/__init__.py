"""The public interfaces for plugins.

    from samplerbench.sampling import Denoiser, Noise, Sampler, Step, intervals, option  # and Guidance, Spacing, …

All interfaces use the same coordinates: the state is x = x₀ + σ z, regardless of the checkpoint's convention.
"""

from samplerbench.errors import UserError, argument
from samplerbench.options import option
from samplerbench.sampling.chain import Chain, markov_variance
from samplerbench.sampling.denoiser import (
    ConditionalDenoiser,
    Denoiser,
    Prediction,
    PredictionType,
    Sigma,
    coefficient,
    per_sample,
)
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.generator import Generator
from samplerbench.sampling.guidance import Guidance
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.ode import Ode, runge_kutta
from samplerbench.sampling.process import (
    RECTIFIED_FLOW,
    SIGMA_INFINITY,
    VARIANCE_EXPLODING,
    VARIANCE_PRESERVING,
    Process,
    is_infinite,
)
from samplerbench.sampling.sampler import Sampler, Step, intervals
from samplerbench.sampling.spacing import Spacing
from samplerbench.sampling.task import SVD, LinearOperator, Observation, Operator, Regime, Task
from samplerbench.sampling.view import ModelView, RunView

__all__ = [
    "RECTIFIED_FLOW",
    "SIGMA_INFINITY",
    "SVD",
    "VARIANCE_EXPLODING",
    "VARIANCE_PRESERVING",
    "Chain",
    "ConditionalDenoiser",
    "Denoiser",
    "FlowSchedule",
    "Generator",
    "Guidance",
    "Inputs",
    "LinearOperator",
    "ModelView",
    "Noise",
    "Observation",
    "Ode",
    "Operator",
    "Prediction",
    "PredictionType",
    "Process",
    "Regime",
    "RunView",
    "Sampler",
    "Sigma",
    "Spacing",
    "Step",
    "Task",
    "UserError",
    "argument",
    "coefficient",
    "intervals",
    "is_infinite",
    "markov_variance",
    "option",
    "per_sample",
    "runge_kutta",
]
