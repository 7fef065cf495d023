"""Names of samplers and spacings in other software, and what they are called here.

The registry names the equivalent in the error for an unknown name. A name of this table is not accepted as a spec, so
that protocols have one name for each method. `docs/coming-from.md` is generated from the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

K_DIFFUSION = "k-diffusion, ComfyUI and Stable Diffusion web UI"
DIFFUSERS = "diffusers"
PAPERS = "Papers"

_PAPER = "test_solvers_agree.py::test_same_as_the_paper"
_FORMULA = "test_candidate_samplers.py::test_same_as_the_formula"
_LANGEVIN = "test_closed_form.py::test_langevin_at_one_level_has_the_stationary_variance_of_its_recursion"
_ORDER = "test_closed_form.py::test_order_of_convergence"
_CM = "test_consistency.py::test_consistency_models_are_sampled_as_by_diffusers_at_every_step"
_LCM = "test_consistency.py::test_lcm_is_that_of_diffusers_at_every_step"
_TCD = "test_consistency.py::test_tcd_is_that_of_diffusers_at_every_step"
_TIMESTEPS = "test_foreign_names.py::test_schedules_of_comfyui"


@dataclass(frozen=True)
class ForeignName:
    """A method of other software.

    Attributes:
        software: heading of its table.
        kind: sampler or spacing.
        names: its names there.
        spec: its spec here, or the spec of the nearest method; "" if there is none.
        shown_by: what shows that the methods are the same: a scheduler of diffusers that gives the same images on the
            same grid, `diffusers/NAME:PARAMETERS`, or a test, `FILE::FUNCTION`. "" if they are not the same.
        note: how they differ, or what to know.
        spacing: spec of the spacing that the name includes; "" if it includes none.
    """

    software: str
    kind: str
    names: tuple[str, ...]
    spec: str
    shown_by: str = ""
    note: str = ""
    spacing: str = ""

    @property
    def message(self) -> str:
        """The end of an error message about one of the names, after a colon."""
        grid = f", with the spacing {self.spacing}" if self.spacing else ""
        note = self.note.replace("`", "")
        why = f" ({note})" if note else ""
        if not self.spec:
            return f"{note}."
        if self.shown_by:
            comparison = self.shown_by.startswith("diffusers/")
            own = self.shown_by.partition(":")[0] if self.software == DIFFUSERS and comparison else ""
            more = f"; the code of diffusers is {own}" if own else ""
            return f"it is called {self.spec} here{grid}{why}{more}."
        if self.spec.startswith("diffusers/"):
            return f"use {self.spec}{grid}{why}."
        return f"the nearest one here is {self.spec}{grid}{why}."


def _k(names: str, spec: str, shown_by: str = "", note: str = "") -> ForeignName:
    return ForeignName(K_DIFFUSION, "sampler", _split(names), spec, shown_by, note)


def _grid(software: str, names: str, spec: str, shown_by: str = "", note: str = "") -> ForeignName:
    return ForeignName(software, "spacing", _split(names), spec, shown_by, note)


def _d(name: str, spec: str = "", shown_by: str = "", note: str = "") -> ForeignName:
    """A class of diffusers. shown_by: its parameters, for which the images are the same."""
    if not spec:
        return ForeignName(DIFFUSERS, "sampler", (name,), f"diffusers/{name}", "", note)
    return ForeignName(DIFFUSERS, "sampler", (name,), spec, shown_by and f"diffusers/{name}:{shown_by}", note)


def _p(names: str, spec: str, shown_by: str = "", note: str = "", spacing: str = "") -> ForeignName:
    return ForeignName(PAPERS, "sampler", _split(names), spec, shown_by, note, spacing)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


_TRAILING = "timestep_spacing=trailing"
_MULTISTEP = f"diffusers/DPMSolverMultistepScheduler:{_TRAILING}"
_SDE = "algorithm_type=sde-dpmsolver++"
_CFG_PP = (
    "dpmpp_2m_cfg_pp, dpmpp_2s_ancestral_cfg_pp, res_multistep_cfg_pp, res_multistep_ancestral_cfg_pp, "
    "gradient_estimation_cfg_pp"
)
_NOT_HERE = "heunpp2, exp_heun_2_x0_sde, res_multistep_ancestral, gradient_estimation, seeds_2, seeds_3, cfgpp_ud10_ab"
_SPACINGS_NOT_HERE = "beta, Beta, use_beta_sigmas, linear_quadratic, kl_optimal, KL Optimal, Align Your Steps"

TABLE: tuple[ForeignName, ...] = (
    _k(
        "sample_euler, euler, Euler, k_euler",
        "ddim",
        f"diffusers/EulerDiscreteScheduler:{_TRAILING}",
        "`pf-ode:solver=euler` gives the same images; without churn",
    ),
    _k(
        "sample_euler_ancestral, euler_ancestral, Euler a",
        "ddpm",
        f"diffusers/EulerAncestralDiscreteScheduler:{_TRAILING}",
        "`ddim:eta=1` gives the same images",
    ),
    _k("sample_heun, heun, Heun", "heun", f"diffusers/HeunDiscreteScheduler:{_TRAILING}"),
    _k(
        "sample_dpm_2, dpm_2, DPM2",
        "dpm-solver",
        f"diffusers/KDPM2DiscreteScheduler:{_TRAILING}",
        "on the same grid; ComfyUI and the web UI leave out the last level above 0",
    ),
    _k("sample_dpm_2_ancestral, dpm_2_ancestral, DPM2 a", "diffusers/KDPM2AncestralDiscreteScheduler"),
    _k(
        "sample_lms, lms, LMS",
        "deis:variable=sigma",
        note="only the last interval differs: x ← D here, an extrapolation to σ = 0 there",
    ),
    _k(
        "sample_dpmpp_2s_ancestral, dpmpp_2s_ancestral, DPM++ 2S a",
        "dpm++:method=singlestep,ancestral=true",
        _FORMULA,
        "`dpm++:method=singlestep` is their eta = 0",
    ),
    _k(
        "sample_dpmpp_sde, dpmpp_sde, DPM++ SDE",
        "dpm++:method=singlestep,sde=true",
        _FORMULA,
        "for the same Brownian motion",
    ),
    _k("sample_dpmpp_2m, dpmpp_2m, DPM++ 2M", "dpm++", _MULTISTEP),
    _k(
        "sample_dpmpp_2m_sde, dpmpp_2m_sde, DPM++ 2M SDE",
        "dpm++:sde=true",
        f"{_MULTISTEP},{_SDE}",
        "for the same normal draws",
    ),
    _k(
        "dpmpp_2m_sde_heun, DPM++ 2M SDE Heun",
        f"diffusers/DPMSolverMultistepScheduler:{_SDE},solver_type=heun",
    ),
    _k(
        "sample_dpmpp_3m_sde, dpmpp_3m_sde, DPM++ 3M SDE",
        "dpm++:sde=true,order=3",
        note="they use half of the second-derivative term, and another second step",
    ),
    _k("sample_dpm_fast, dpm_fast, DPM fast", "dpm-solver:order=3", note="of order 3 in every step but the last"),
    _k(
        "sample_dpm_adaptive, dpm_adaptive, DPM adaptive",
        "pf-ode:solver=rk45",
        note="adaptive too, with another Runge-Kutta pair",
    ),
    _k("ddpm", "ddpm", f"diffusers/DDPMScheduler:{_TRAILING}"),
    _k("ddim, DDIM", "ddim", f"diffusers/DDIMScheduler:{_TRAILING}"),
    _k("ipndm", "ipndm", _PAPER),
    _k("ipndm_v", "deis:variable=sigma", note="Adams-Bashforth with weights for uneven steps"),
    _k("deis", "deis:order=2", note="ComfyUI fits a time to the grid, samplerbench uses the time of the model"),
    _k("uni_pc, UniPC", "unipc:variant=B1", note="their last interval does not end at σ = 0"),
    _k("uni_pc_bh2", "unipc", note="their last interval does not end at σ = 0"),
    _k("er_sde", "er-sde", _FORMULA),
    _k("res_multistep", "res", _FORMULA),
    _k("exp_heun_2_x0", "res:method=singlestep,c=1", _FORMULA),
    _k("sa_solver", "sa-solver", note="theirs has noise in the middle of the time steps only"),
    _k("sa_solver_pece", "sa-solver", note="theirs evaluates D twice in a step"),
    _k("Restart", "restart", note="the web UI chooses the restarts by the number of steps"),
    _k("lcm, LCM", "consistency", _LCM, "it requires a consistency-distilled model"),
    _k("PLMS", "diffusers/PNDMScheduler:skip_prk_steps=true", note="the nearest one of samplerbench is ipndm"),
    _k(
        "cfg++, ddim_cfgpp, DDIM CFG++, euler_cfg_pp",
        "ddim:cfg_pp=true",
        "test_candidate_guidances.py::test_cfg_pp_is_ddim_with_a_scale_for_each_step",
        "with the guidance `cfg:scale=0.6`",
    ),
    _k(
        "euler_ancestral_cfg_pp",
        "ddim:eta=1,cfg_pp=true",
        "test_candidate_guidances.py::test_ancestral_cfg_pp_is_that_of_comfyui",
        "with the guidance `cfg:scale=0.6`",
    ),
    _k(_CFG_PP, "", note="CFG++ is available for ddim only"),
    _k(_NOT_HERE, "", note="this method is not available here"),
    _grid(K_DIFFUSION, "get_sigmas_karras, karras, Karras", "karras", "test_spacings.py::test_karras_is_equation_5"),
    _grid(
        K_DIFFUSION,
        "get_sigmas_exponential, exponential, Exponential",
        "exponential",
        "test_foreign_names.py::test_exponential_is_that_of_k_diffusion",
    ),
    _grid(
        K_DIFFUSION,
        "get_sigmas_polyexponential, Polyexponential",
        "exponential",
        "test_foreign_names.py::test_exponential_is_that_of_k_diffusion",
        "`rho` is a parameter",
    ),
    _grid(K_DIFFUSION, "normal, Normal, Uniform", "linspace", note="the same timesteps, rounded"),
    _grid(K_DIFFUSION, "sgm_uniform, SGM Uniform", "trailing", note="its timesteps differ by less than 1.5"),
    _grid(
        K_DIFFUSION, "simple, Simple", "trailing", _TIMESTEPS, "if the number of steps divides the number of timesteps"
    ),
    _grid(
        K_DIFFUSION,
        "ddim_uniform",
        "leading:offset=1",
        _TIMESTEPS,
        "if the number of steps divides the number of timesteps",
    ),
    _grid(K_DIFFUSION, _SPACINGS_NOT_HERE, "", note="this schedule is not available here; `list` takes noise levels"),
    _d("DDIMScheduler", "ddim", "timestep_spacing=leading"),
    _d("DDIMParallelScheduler", "ddim", "timestep_spacing=leading"),
    _d("CogVideoXDDIMScheduler"),
    _d("DDPMScheduler", "ddpm", "timestep_spacing=leading", "`variance_type=fixed_large` is `ddpm:variance=large`"),
    _d("DDPMParallelScheduler", "ddpm", "timestep_spacing=leading"),
    _d("EulerDiscreteScheduler", "ddim", _TRAILING),
    _d("EulerAncestralDiscreteScheduler", "ddpm", _TRAILING),
    _d("HeunDiscreteScheduler", "heun", _TRAILING),
    _d("KDPM2DiscreteScheduler", "dpm-solver", _TRAILING),
    _d("KDPM2AncestralDiscreteScheduler"),
    _d(
        "LMSDiscreteScheduler",
        "deis:variable=sigma",
        note="only the last interval differs; diffusers/LMSDiscreteScheduler is the original",
    ),
    _d("DPMSolverMultistepScheduler", "dpm++", _TRAILING, f"`{_SDE}` is `dpm++:sde=true`"),
    _d(
        "DPMSolverSinglestepScheduler",
        "dpm++:method=singlestep",
        note="one step here is two there; diffusers/DPMSolverSinglestepScheduler is the original",
    ),
    _d(
        "DPMSolverSDEScheduler",
        "dpm++:method=singlestep,sde=true",
        note="the scheduler of diffusers draws its own noise",
    ),
    _d("UniPCMultistepScheduler", "unipc:order=2", _TRAILING),
    _d(
        "DEISMultistepScheduler",
        "deis:order=1,variable=log-sigma",
        note="it steps to σ = 0; diffusers/DEISMultistepScheduler does not",
    ),
    _d("PNDMScheduler", note="the nearest one of samplerbench is ipndm"),
    _d("IPNDMScheduler", "ipndm", note="the same weights; the scheduler has a noise schedule of its own"),
    _d(
        "SASolverScheduler",
        "sa-solver",
        note="the scheduler has noise at the timesteps 200 to 800 only, and does not step to σ = 0",
    ),
    ForeignName(DIFFUSERS, "sampler", ("LCMScheduler",), "consistency", _LCM, "it requires a distilled model"),
    ForeignName(
        DIFFUSERS, "sampler", ("TCDScheduler",), "consistency:gamma=0.3", _TCD, "it ends at timestep 0, not at σ = 0"
    ),
    ForeignName(
        DIFFUSERS,
        "sampler",
        ("CMStochasticIterativeScheduler",),
        "consistency:sigma_min=0.002",
        _CM,
        "on its levels: `trailing` if the number of steps divides the number of timesteps, else `list`",
    ),
    _grid(DIFFUSERS, "use_karras_sigmas", "karras", "test_solvers_agree.py::test_same_as_diffusers"),
    _grid(
        DIFFUSERS,
        "use_exponential_sigmas",
        "exponential",
        "test_solvers_agree.py::test_singlestep_dpmpp_is_diffusers_on_every_other_level",
    ),
    _p("ancestral, ddpm-sampler", "ddpm", _PAPER),
    _p("ode, probability-flow, flow-ode", "pf-ode", _ORDER),
    _p("consistency models, multistep-consistency", "consistency", _CM),
    _p("tcd, trajectory-consistency", "consistency:gamma=0.3", _TCD),
    _p("rk4", "pf-ode:solver=rk4", _ORDER),
    _p(
        "rk45, dopri5",
        "pf-ode:solver=rk45",
        "test_closed_form.py::test_adaptive_solver_has_the_cost_of_a_fifth_order_method",
    ),
    _p("sde, reverse-sde, em", "euler-maruyama", _PAPER),
    _p("pc-sampler, predictor-corrector", "pc", _PAPER),
    _p("vpsde, vesde", "pc", note="the SDE is a property of the model; pc is the sampler of Song et al. 2021"),
    _p("ncsn, smld, ald", "langevin", _LANGEVIN, "its step size r is that of the paper in units of σ²"),
    _p("edm, edm-heun", "heun", _PAPER, spacing="karras"),
    _p("dpm-solver-1", "dpm-solver:order=1", _PAPER),
    _p("dpm-solver-2", "dpm-solver", _PAPER),
    _p("dpm-solver-3", "dpm-solver:order=3", _PAPER),
    _p("dpm-solver++, dpm-solver++2m, dpm-solver++(2m)", "dpm++", _PAPER),
    _p("dpm-solver++2s, dpm-solver++(2s)", "dpm++:method=singlestep", _PAPER),
    _p(
        "dpm-solver++3m, dpm-solver++(3m), dpmpp_3m",
        "dpm++:order=3",
        _PAPER,
        "the authors' code uses half of the second-derivative term",
    ),
    _p("sde-dpm-solver++", "dpm++:sde=true", _PAPER),
    _p("er-sde-solver-1", "er-sde:order=1", _FORMULA),
    _p("er-sde-solver-2", "er-sde:order=2", _FORMULA),
    _p("er-sde-solver-3", "er-sde", _FORMULA),
    _p("unipc-1", "unipc:order=1", _PAPER),
    _p("unipc-2", "unipc:order=2", _PAPER),
    _p("unipc-3", "unipc", _PAPER),
    _p("rho-ab3", "deis:variable=sigma", _PAPER),
    _p("tab3, tab-deis", "deis", "test_solvers_agree.py::test_deis_takes_the_time_from_the_models_levels"),
    _p("pndm", "diffusers/PNDMScheduler", note="the nearest one of samplerbench is ipndm"),
    _p("analytic-ddpm", "analytic-dpm", "test_analytic_dpm.py::test_the_reverse_variance_is_the_optimal_one"),
    _p("analytic-ddim", "analytic-dpm:form=ddim", "test_analytic_dpm.py::test_the_reverse_variance_is_the_optimal_one"),
)

_SUFFIXES = {"karras": "karras", "ka": "karras", "exponential": "exponential"}
"""Endings that name a spacing, as in `DPM++ 2M Karras` and `k_dpmpp_2m_ka`."""


_WITHOUT_SIGMAS = ("diffusers/PNDMScheduler",)
"""Schedulers of diffusers without parameters for these spacings."""


def normalised(name: str) -> str:
    """A name without case, hyphens, underscores, spaces and parentheses, with `pp` for `++`."""
    return re.sub(r"[-_ ()]", "", name.lower()).replace("++", "pp")


_BY_NAME = {(row.kind, normalised(name)): row for row in reversed(TABLE) for name in row.names}


def lookup(kind: str, name: str, known: Collection[str] = ()) -> ForeignName | None:
    """The method that a name of other software stands for; None if the table does not have it.

    Args:
        kind: sampler or spacing.
        name: a name that is not registered.
        known: the registered names of this kind. A method whose spec has another name is not returned, and
            a different spelling of a registered name is not a name of other software.
    """
    key = normalised(name)
    own = {normalised(k): k for k in known}
    if key in own:
        return None
    row = _row(kind, key, own)
    if row is None and name.endswith("Scheduler") and name.isidentifier() and kind == "sampler":
        row = ForeignName(DIFFUSERS, kind, (name,), f"diffusers/{name}")
    if row is not None and row.spec and re.split("[:/]", row.spec)[0] not in known:
        return None
    return row


def _row(kind: str, key: str, own: dict[str, str]) -> ForeignName | None:
    """The row of a normalised name, also with a prefix (`sample_`, `k_`) or an ending (`_gpu`, `Karras`)."""
    bases = [key, *(key.removeprefix(prefix) for prefix in ("sample", "k") if key.startswith(prefix))]
    bases += [base.removesuffix("gpu") for base in bases if base.endswith("gpu")]
    for base in bases:
        if row := _BY_NAME.get((kind, base)):
            return row
        if base in own:
            return ForeignName(K_DIFFUSION, kind, (key,), own[base], shown_by=_PAPER)
    if kind != "sampler":
        return None
    for ending, spacing in _SUFFIXES.items():
        if key.endswith(ending) and (stem := key.removesuffix(ending)):
            row = _row(kind, stem, own)
            if row is None or row.software != K_DIFFUSION:
                return None
            if not row.spec or row.spec.partition(":")[0] in _WITHOUT_SIGMAS:
                return row
            if row.spec.startswith("diffusers/"):  # its schedulers have grids of their own
                joint = "," if ":" in row.spec else ":"
                return replace(row, spec=f"{row.spec}{joint}use_{spacing}_sigmas=true")
            return replace(row, spacing=spacing)
    return None


# From a method here to its name elsewhere

_MORE_SCHEDULERS = (
    ("dpm++:order=1", "DPMSolverMultistepScheduler:solver_order=1"),
    ("dpm++:order=3", "DPMSolverMultistepScheduler:solver_order=3"),
    ("unipc:order=1", "UniPCMultistepScheduler:solver_order=1"),
    ("unipc", "UniPCMultistepScheduler:solver_order=3"),
    ("unipc:order=2,variant=B1", "UniPCMultistepScheduler:solver_type=bh1"),
    ("unipc:variant=B1", "UniPCMultistepScheduler:solver_order=3,solver_type=bh1"),
)
"""Schedulers of diffusers with other parameters than those in the table."""
GUIDANCE_SCALES = ("cfg",)
"""Guidances whose `scale`, with the other parameters at their defaults, is `guidance_scale` of diffusers' pipelines."""
_TIMESTEP_SPACINGS = {"trailing": "trailing", "leading:offset=0": "leading", "linspace": "linspace"}
_SIGMA_SPACINGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}


def equivalent(kind: str, same: Callable[[str], bool]) -> ForeignName | None:
    """The row of k-diffusion and ComfyUI for a method. The same method is preferred to the nearest one.

    Args:
        kind: sampler or spacing.
        same: returns whether a spec stands for the method.
    """
    rows = [row for row in TABLE if (row.software, row.kind) == (K_DIFFUSION, kind) and row.spec]
    for row in sorted(rows, key=lambda row: not row.shown_by):  # a stable sort
        others = re.findall("`([^`]+)` gives the same images", row.note)
        if not row.spec.startswith("diffusers/") and any(same(spec) for spec in (row.spec, *others)):
            return row
    return None


def schedulers(
    same_sampler: Callable[[str], bool], same_spacing: Callable[[str], bool]
) -> Iterator[tuple[str, dict[str, str | bool | int]]]:
    """Schedulers of diffusers, with arguments, that may be equivalent to a sampler with a spacing.

    Whether one is equivalent also depends on the configuration of the pipeline, so the caller must compare them.

    Args:
        same_sampler: returns whether a spec stands for the sampler.
        same_spacing: returns whether a spec stands for the spacing.

    Yields:
        The name of the class, and its arguments.
    """
    grids: list[dict[str, str | bool | int]] = [
        {"timestep_spacing": name} for spec, name in _TIMESTEP_SPACINGS.items() if same_spacing(spec)
    ]
    grids += [{name: True} for spec, name in _SIGMA_SPACINGS.items() if same_spacing(spec)]
    named = [(row.spec, row.shown_by.removeprefix("diffusers/")) for row in TABLE if row.shown_by[:10] == "diffusers/"]
    seen = set()
    for spec, shown in (*named, *_MORE_SCHEDULERS):
        name, _, text = shown.partition(":")
        pairs = (part.partition("=") for part in text.split(",") if part)
        arguments = {key: int(value) if value.isdigit() else value for key, _, value in pairs}
        arguments.pop("timestep_spacing", None)
        if (name, str(arguments)) in seen or not same_sampler(spec):
            continue
        seen.add((name, str(arguments)))
        for grid in grids:
            yield name, {**arguments, **grid}
