"""The table of a run, and its verdict on every target: from the CSV's rows alone.

The targets are those the project set itself before anything was measured (bf16, medians, same run).
A GPU target is judged by rows of a GPU only: on the CPU the projector's ops run as plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Row = dict[str, str]
OURS = "tokenflex"
EAGER = "PyTorch eager"
COMPILED = "torch.compile, max-autotune"
NOT_MEASURED = "not measured here"


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes:
        target: what was to be reached.
        value: the worst that was measured, None if nothing was.
        bound: what ``value`` is held against.
        at_least: whether ``value`` must not be below ``bound``, or not above it.
        where: the case of the worst value.
    """

    target: str
    value: float | None
    bound: float
    at_least: bool
    where: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        if self.value is None:
            return NOT_MEASURED
        gap = abs(self.value / self.bound - 1)
        word = f"met, {gap:.1%} to spare" if self.met else f"SHORT by {gap:.1%}"
        return f"{word}: {self.value:.3g} at worst ({self.where})"


class Results:
    """The rows of one machine, by op, case, mode and variant."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row["status"] == "ok"]
        self._found = {self._key(row): row for row in self.rows}
        self.on_gpu = any(row["device"] == "cuda" for row in self.rows)

    @staticmethod
    def _key(row: Row) -> tuple[str, str, str, str]:
        return row["op"], row["case"], row["mode"], row["variant"]

    def beside(self, row: Row, variant: str) -> Row | None:
        """The same case and mode by another variant."""
        return self._found.get((row["op"], row["case"], row["mode"], variant))

    def ours(
        self, op: str, mode: str | None = None, variant: str = OURS, gpu: bool = True
    ) -> list[Row]:
        """Our rows of an op; none of the CPU's if ``gpu``, none of a reference."""
        return [
            row
            for row in self.rows
            if (row["op"], row["variant"]) == (op, variant)
            and mode in (None, row["mode"])
            and row["backend"] != "reference"
            and (self.on_gpu or not gpu)
        ]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target, judged by its worst case."""
    found = Results(rows)
    ours = found.ours

    def speed_up(other: str, column: str = "p50_us") -> Callable[[Row], float | None]:
        def value(row: Row) -> float | None:
            peer = found.beside(row, other)
            if peer is None or not peer[column] or not row[column]:
                return None
            return float(peer[column]) / float(row[column])

        return value

    def ratio(other: str, column: str) -> Callable[[Row], float | None]:
        def value(row: Row) -> float | None:
            faster = speed_up(other, column)(row)
            return 1 / faster if faster else None

        return value

    def share(row: Row) -> float | None:
        return float(row["share_of_copy"]) if row["share_of_copy"] else None

    def large(rows: list[Row]) -> list[Row]:
        return [row for row in rows if int(row["tokens"]) >= 2048]

    def uniform(rows: list[Row]) -> list[Row]:
        return [row for row in rows if "mixed" not in row["case"] and "uniform" not in row["case"]]

    result: list[Verdict] = []

    def judge(
        target: str,
        chosen: list[Row],
        value: Callable[[Row], float | None],
        bound: float,
        at_least: bool = True,
    ) -> None:
        values = [(measured, row) for row in chosen if (measured := value(row)) is not None]
        if not values:
            result.append(Verdict(target, None, bound, at_least))
            return
        worst, row = (min if at_least else max)(values, key=lambda one: one[0])
        where = f"{row['case']}, {row['mode']}" if row["op"] != "host_cost" else row["variant"]
        result.append(Verdict(target, worst, bound, at_least, where))

    full = [row for row in uniform(large(ours("pool_norm"))) if row["case"].startswith("128")]
    forward = [row for row in full if row["mode"] == "forward"]
    backward = [row for row in full if row["mode"] == "backward"]
    judge("pool+LN forward: >= 85 % of copy bandwidth", forward, share, 0.85)
    judge("pool+LN backward: >= 80 % of copy bandwidth", backward, share, 0.80)
    judge("pool+LN: >= 3x the eager chain", full, speed_up(EAGER), 3)
    judge("pool+LN: >= 1.3x torch.compile", full, speed_up(COMPILED), 1.3)

    gate_up = large(ours("swiglu", "forward"))
    bare = ratio("bare product", "p50_us")
    judge("gate/up forward, T >= 2048: <= 1.06x the bare product", gate_up, bare, 1.06, False)
    compiled = speed_up(COMPILED)
    judge("gate/up forward, T >= 2048: >= 1.10x torch.compile", gate_up, compiled, 1.10)

    projector = ours("project_tokens")
    both = [row for row in large(projector) if row["mode"] != "backward"]
    judge("projector, T >= 2048: >= 1.2x eager", uniform(both), speed_up(EAGER), 1.2)
    judge("projector, T >= 2048: >= 1.08x torch.compile", both, speed_up(COMPILED), 1.08)
    for peer in ("liger-kernel", "quack-kernels"):
        judge(f"projector, T >= 2048: >= {peer}", both, speed_up(peer), 1)
    judge(
        "projector, T >= 2048: >= flash-swiglu-mlp (no biases)",
        large(ours("project_tokens", variant="tokenflex, no biases")),
        speed_up("flash-swiglu-mlp, no biases"),
        1,
    )
    small = [row for row in projector if int(row["tokens"]) <= 256 and row["mode"] != "backward"]
    wall = speed_up(EAGER, "eager_us")
    judge("projector, T <= 256: >= 2x eager, wall clock", small, wall, 2)
    judge("projector, any T: never slower than eager", projector, speed_up(EAGER), 1)
    judge("projector, any T: nor by the wall clock", projector, wall, 1)

    for op in ("pool_norm", "project_tokens"):
        mixed = [row for row in ours(op) if row["case"].endswith("mixed")]
        judge(f"{op}, mixed counts: <= 1.05x uniform", mixed, _over_uniform(found), 1.05, False)
        judge(f"{op}, mixed counts: >= 1.5x a loop over groups", mixed, speed_up(EAGER), 1.5)

    training = ours("project_tokens", "forward+backward")
    saved = ratio(EAGER, "saved_bytes")
    judge("saved for backward, preactivation: <= 0.55x eager", training, saved, 0.55, False)
    lean = ours("project_tokens", "forward+backward", "tokenflex, save=input")
    judge("saved for backward, input: <= 0.15x eager", lean, saved, 0.15, False)

    packs = large(ours("pack_embeddings"))
    forward = [row for row in packs if row["mode"] == "forward"]
    frozen = [row for row in packs if row["case"].endswith("frozen table")]
    frozen = [row for row in frozen if row["mode"] == "forward+backward"]
    judge("pack forward, T >= 2048: >= 90 % of copy bandwidth", forward, share, 0.90)
    judge("pack forward+backward, frozen table: >= 85 %", frozen, share, 0.85)
    scatter = speed_up("embedding + masked_scatter")
    judge("pack, T >= 2048: >= 5x masked_scatter", [*forward, *frozen], scatter, 5)
    on_cpu = [] if found.on_gpu else large(ours("pack_embeddings", gpu=False))
    judge("pack on the CPU, T >= 2048: >= 2x masked_scatter", on_cpu, scatter, 2)

    result.append(_host_cost(found))
    accurate = [row for row in found.rows if row["variant"].startswith(OURS) and row["error"]]
    accurate = [row for row in accurate if found.on_gpu and row["backend"] != "reference"]
    judge("error against float64: <= 1.2x eager's", accurate, ratio(EAGER, "error"), 1.2, False)
    return result


def _host_cost(found: Results) -> Verdict:
    """The dearest op call among those that run compiled code here."""
    target = "host cost of an op call, forward: <= 15 us"
    calls = [
        (float(row["p50_us"]), row["variant"])
        for row in found.rows
        if row["op"] == "host_cost"
        and row["case"] == "no grad"
        and row["backend"] in ("triton", "cuda", "cpp")
    ]
    if not calls:
        return Verdict(target, None, 15, False)
    worst, name = max(calls)
    return Verdict(target, worst, 15, False, f"{name}, {len(calls)} ops")


def _over_uniform(found: Results) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        case = row["case"].replace("mixed", "uniform")
        other = found._found.get((row["op"], case, row["mode"], row["variant"]))
        return float(row["p50_us"]) / float(other["p50_us"]) if other else None

    return value


def token_savings(rows: Sequence[Row]) -> list[str]:
    """End to end: how much of the tokens that mixed counts save becomes time."""
    steps = {
        (row["case"].split()[0], row["variant"]): row
        for row in rows
        if row["op"] == "end_to_end" and row["status"] == "ok"
    }
    lines = []
    for variant in ("packed", "padded"):
        fixed, mixed = steps.get(("fixed", variant)), steps.get(("mixed", variant))
        if not fixed or not mixed:
            continue
        tokens = 1 - int(mixed["tokens"]) / int(fixed["tokens"])
        seconds = 1 - float(mixed["p50_us"]) / float(fixed["p50_us"])
        lines.append(
            f"{variant}: mixed counts save {tokens:.1%} of the sequence and {seconds:.1%} of the "
            f"time: {seconds / tokens:.0%} of the saving becomes time"
        )
    return lines


def print_report(rows: Sequence[Row]) -> None:
    """Every row that was measured, what was not and why, and the verdicts."""
    print(
        f"\n{'op':16}{'case':46}{'mode':18}{'variant':36}"
        f"{'p50':>12}{'eager':>11}{'copy':>7}{'matmul':>8}  backend"
    )
    for row in rows:
        if row["status"] != "ok":
            continue
        print(
            f"{row['op']:16}{row['case']:46}{row['mode']:18}{row['variant']:36}"
            f"{float(row['p50_us']):9.1f} us{_micro(row['eager_us']):>11}"
            f"{_percent(row['share_of_copy']):>7}{_percent(row['share_of_matmul']):>8}"
            f"  {row['backend']}"
        )
    skipped = [row for row in rows if row["status"] != "ok"]
    if skipped:
        print("\nnot measured:")
    for row in skipped:
        name = ", ".join(filter(None, (row["op"], row["case"], row["mode"], row["variant"])))
        print(f"  {name}: {row['status']}")
    if savings := token_savings(rows):
        print("\nend to end:")
    for line in savings:
        print(f"  {line}")
    print("\ntargets:")
    for verdict in verdicts(rows):
        print(f"  {verdict.target:62} {verdict}")


def _micro(value: str) -> str:
    return f"{float(value):.1f}" if value else ""


def _percent(value: str) -> str:
    return f"{100 * float(value):.1f}%" if value else ""
