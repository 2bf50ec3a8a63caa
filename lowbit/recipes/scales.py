"""Methods that scale channels: SmoothQuant, OS+ and AWQ. All is fused, nothing runs online."""

from dataclasses import replace

from lowbit.recipes.recipe import Calibration, Recipe
from lowbit.rounding import RTN
from lowbit.transforms import AWQ as AWQFit
from lowbit.transforms import OutlierSuppressionPlus, Scale
from lowbit.transforms import SmoothQuant as SmoothQuantFit

NORM_OUTPUTS = ("attention_input", "mlp_input")


def scaled(fit, *spaces: str) -> tuple[Scale, ...]:
    return tuple(Scale(space, fit) for space in spaces)


# alpha: 0.5 in the paper, 0.8 to 0.9 in its authors' settings for Llama; 0.8 in source 004's tool.
SMOOTHQUANT = Recipe(
    name="smoothquant",
    summary="range moved from norm outputs into weights, rounded to nearest",
    source="Xiao et al. 2023, arXiv 2211.10438",
    rounding=RTN(),
    transforms=scaled(SmoothQuantFit(alpha=0.8), *NORM_OUTPUTS),
    calibration=Calibration(512, 512),
    reproduces=(("001", "SmoothQuant"), ("002", "SmoothQuant"), ("004", "SmoothQuant")),
)

# One sample of 512 tokens to try thresholds on, as in source 004's tool; no shift: see the fit.
OS_PLUS = Recipe(
    name="os+",
    summary="outlier channels of norm outputs scaled down to a searched threshold",
    source="Wei et al. 2023, arXiv 2304.09145",
    rounding=RTN(),
    transforms=scaled(OutlierSuppressionPlus(), *NORM_OUTPUTS),
    calibration=Calibration(128, 512),
    reproduces=(("004", "OS+"),),
)

# v -> o is kept with grouped-query attention, where the authors' code leaves it out.
AWQ = Recipe(
    name="awq",
    summary="salient channels scaled up, group ranges clipped for the output",
    source="Lin et al. 2024, arXiv 2306.00978",
    rounding=RTN(clip="output"),
    transforms=scaled(AWQFit(), *NORM_OUTPUTS, "value_channels", "mlp_hidden"),
    calibration=Calibration(128, 512),
    reproduces=(("004", "AWQ"),),
)

AWQ_SYMMETRIC_CLIP = replace(
    AWQ,
    name="awq-symmetric-clip",
    summary="AWQ as its authors' code clips, also where grids are asymmetric",
    rounding=RTN(clip="output-symmetric"),
    reproduces=(("003", "AWQ"),),
)
