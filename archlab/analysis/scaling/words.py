"""What a scaling study shows and what it does not, in words that follow from its points and fits."""

from collections.abc import Mapping, Sequence

import numpy as np

from archlab.analysis.accounts import short
from archlab.analysis.scaling.frontier import Multiplier
from archlab.analysis.scaling.points import Points
from archlab.analysis.scaling.study import AHEAD, Study, coefficients

FORETOLD = 2.0  # times the spread of the residuals; where predictions are further off it is said
LOOSE = 0.5  # of a coefficient; where intervals of these are wider it is said
LOOSE_NAMES = ("E", "alpha", "beta")


def flops(value: float, digits: int = 2) -> str:
    """An amount of compute: 1.2e+19 as "1.2e19"."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def headline(studies: Mapping[str, Study], found: Mapping[str, Multiplier], reference: str) -> list[str]:
    """A paragraph for each architecture: its compute against the reference's at equal loss; or why there is none."""
    lines = [f"`{name}` against `{reference}`: {m.verdict}." for name, m in found.items()]
    if not found and studies[reference].fit and len(studies) == 1:
        lines.append(f"`{reference}` was run alone: nothing is compared.")
    return lines + [f"`{name}` has no law: {_own(one, one.refused)}." for name, one in studies.items() if not one.fit]


def caveats(studies: Mapping[str, Study], found: Mapping[str, Multiplier]) -> list[str]:
    """Paragraphs: what was seen, by range and by seeds; how well the laws hold; what they leave open."""
    fitted = {name: one for name, one in studies.items() if one.fit}
    lines = [_seen([one.points for one in studies.values()], bool(fitted)), _seeds(studies)]
    lines += [f"`{name}`: " + "; ".join(held(one) + _open(one)) + "." for name, one in fitted.items()]
    lines += [f"`{name}`: {_minima(one)}." for name, one in studies.items() if _minima(one)]
    lines += [line for name, m in found.items() if (line := _trend(name, m))]
    lines.append("Compute is counted in FLOPs of training by the convention named below; time, memory and the speed of "
                 "generation are not compared here, and another convention gives other exponents and multipliers.")
    return lines


def _seen(all_points: Sequence[Points], fitted: bool) -> str:
    N, D, C = (np.concatenate([getattr(points, key) for points in all_points]) for key in "NDC")
    ratio = D / N
    return (f"Seen were {short(N.min())} to {short(N.max())} parameters, {short(D.min())} to "
            f"{short(D.max())} tokens, {flops(C.min())} to {flops(C.max())} FLOPs, and {ratio.min():.3g} to "
            f"{ratio.max():.3g} tokens per parameter." + fitted * (
                f" Between these the laws join what was measured. Beyond {flops(C.max())} FLOPs they are a guess: "
                f"dashed, flagged, and for at most {AHEAD:.0f} times that."))


def _seeds(studies: Mapping[str, Study]) -> str:
    repeated = {name: len(one.points) - len({(n, d) for n, d in zip(one.points.N, one.points.D)})
                for name, one in studies.items()}
    if not any(repeated.values()):
        return ("No (N, D) was run twice: how much a loss changes from seed to seed is seen only in how far runs lie "
                "from their law, which the intervals are made from. What is common to all runs of one architecture, "
                "such as a learning rate that suits it badly, is not in them.")
    return "Runs beyond the first at an (N, D), with another seed: " + ", ".join(
        f"{count} of `{name}`" for name, count in repeated.items() if count) + "."


def held(one: Study) -> list[str]:
    """How far runs lie from their law, those that it has seen and those that it has not."""
    spread = one.spread()
    lines = [f"runs lie {spread:.2%} from the law (standard deviation)" if np.isfinite(spread) else
             "there are as many runs as coefficients, so that the law goes through all of them and nothing tests it"]
    if one.holdout is None:
        return [*lines, f"its largest budget cannot be foretold from the others ({_own(one, one.unheld)})"]
    error = one.holdout.mean_error
    told = f"without the {len(one.holdout.left_out)} of most compute the law foretells these to {error:.2%} on average"
    return [*lines, told + (f", {error / spread:.1f} times as far: do not trust it far beyond the runs"
                            if error > FORETOLD * spread else "")]


def _open(one: Study) -> list[str]:
    """Coefficients that the runs do not determine."""
    lines = []
    if absent := one.fit.absent:
        lines.append(f"the fit has no use for {' and '.join(absent)}: without such a term optimal N and D, and what is "
                     "beyond the runs, mean nothing")
    loose = [f"{row['coefficient']} ({_from(row['low'])} to {row['high']:.3g})" for row in coefficients(one)
             if row["coefficient"] in LOOSE_NAMES and not row["high"] - row["low"] < LOOSE * abs(row["value"])]
    if loose:
        lines.append(f"left open by the runs are {', '.join(loose)}: losses between the runs are told far better")
    if one.fit.arrived < 0.5:
        lines.append(f"only {one.fit.arrived:.0%} of the searches ended at this optimum")
    return lines


def _minima(one: Study) -> str:
    """Of the isoFLOP parabolas; nothing where all minima were enclosed."""
    outside = [p for p in one.parabolas if not p.inside]
    if not outside:
        return ""
    return (f"the minimum of {len(outside)} of {len(one.parabolas)} isoFLOP parabolas lies outside of the sizes that "
            f"were run (at {', '.join(flops(p.C) for p in outside)} FLOPs): they do not enclose the optimum there")


def _trend(name: str, m: Multiplier) -> str:
    """Whether a multiplier is seen to change with scale."""
    if len(m.losses) < 2:
        return ""
    apart = m.high[0] < m.low[-1] or m.high[-1] < m.low[0]
    said = "its intervals there do not overlap" if apart else "its intervals there overlap: no trend is told"
    return (f"`{name}`: from loss {m.losses[0]:.4g} to {m.losses[-1]:.4g} its multiplier goes from {m.ratio[0]:.3g} to "
            f"{m.ratio[-1]:.3g}; {said}.")


def _own(one: Study, reason: str) -> str:
    """A refusal without the architecture's name, which stands before it already."""
    return reason.removeprefix(f"{one.points.name}: ")


def _from(low: float) -> str:
    return "0" if abs(low) < 1e-6 else f"{low:.3g}"
