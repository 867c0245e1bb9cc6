"""Runs everything on a GPU: tests, times and peak memory, and trainings at full size.

    make gpu                                 # every part; make gpu PART=diffusion runs one
    python -m benchmarks.speed.gpu PART ...  # the same; --small is a rehearsal, which also runs on a CPU

Each part should take less than eight minutes. A part that is interrupted keeps the rows that it has measured, and
trainings resume at the next call. CONTRIBUTING.md says which packages are needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.harness import ROOT, Row, parser, report
from benchmarks.common.measuring import CUDA, DEVICE, Run, compare, for_each
from benchmarks.common.networks import KEYPOINTS, NETWORKS, WIDTH, build_all, reason_of
from benchmarks.speed.plain import PlainDiffusion
from benchmarks.speed.ways import PRECISIONS, WAYS, Case, in_way, precision, record, side_by_side
from examples.unet import KAFUNet, UNetC2
from kaf_layer import KAFEncoder, KAFLayer, KeypointDiffusion, Keypoints, SIFTDetector

BATCH, EDGE = 8, 512
SECONDS = 450  # after which a training is stopped; the next call resumes it
NOTES = f"""Forward and backward pass, batch {BATCH}, {KEYPOINTS} keypoints. ms: medians of alternating runs. GB (10^9
bytes): the peak above weights and inputs. "Graphed": the step is recorded as a CUDA graph."""


def random_keypoints(batch: int, edge: int) -> Keypoints:
    positions = torch.rand(batch, KEYPOINTS, 2, device=DEVICE) * edge
    return Keypoints(positions, torch.ones(batch, KEYPOINTS, dtype=torch.bool, device=DEVICE), (edge, edge))


def diffusions(edge: int, batch: int) -> dict[str, Case]:
    """Returns our diffusion and the paper's over every pixel, on a map of a UNet whose scales are equally large."""
    channels = WIDTH * EDGE // edge
    tokens = torch.randn(batch, KEYPOINTS, 256, device=DEVICE, requires_grad=True)
    inputs = tokens, random_keypoints(batch, edge), (edge, edge)
    networks = {"ours": KeypointDiffusion(256, channels), "dense": PlainDiffusion(256, channels)}
    return {name: (network.to(DEVICE), inputs) for name, network in networks.items()}


def unets(edge: int, batch: int, *, width: int = WIDTH, depth: int = 6) -> dict[str, Case]:
    inputs = torch.rand(batch, 1, edge, edge, device=DEVICE), random_keypoints(batch, edge)
    networks = {"UNet (c2)": UNetC2(width=width), "KAF-UNet": KAFUNet(width=width, depth=depth)}
    return {name: (network.to(DEVICE), inputs) for name, network in networks.items()}


def stacks(edge: int, batch: int, *, names: Sequence[str] = tuple(NETWORKS), attentions: int = 20) -> dict[str, Case]:
    """Returns the networks that memory.py compares, Swin-T first."""
    with torch.device(DEVICE):
        builders = {name: NETWORKS[name] for name in sorted(names, key=lambda name: name != "Swin-T")}
        networks, reasons = build_all(builders, attentions)
        for name, reason in reasons.items():
            print(f"{name}: {reason}", file=sys.stderr)
        return {name: (network, network.inputs(edge, batch)) for name, network in networks.items()}


FEW = ("KAF layers", "Swin-T")


def diffusion(*, small: bool) -> Iterator[Row]:
    """Targets: at 512 20 times as fast as dense in bfloat16, with a fiftieth of its memory; never slower."""
    for dtype in PRECISIONS:
        for edge in (32,) if small else (512, 256, 128, 64):
            cases = diffusions(edge, 1 if small else BATCH)
            for row in side_by_side(cases, dtype=dtype, ways=("eager", "graphed")):
                yield {"map": f"{edge}x{edge}"} | row


def stack(*, small: bool) -> Iterator[Row]:
    """Target: 0.35 of Swin-T's time at 512, 0.1 at 1024."""
    for dtype in PRECISIONS:
        for edge in (32,) if small else (512, 1024):
            cases = stacks(edge, 1, names=FEW, attentions=8) if small else stacks(edge, BATCH)
            for row in side_by_side(cases, dtype=dtype, ways=("eager",), repeats=5):
                yield {"image": f"{edge}x{edge}"} | row


def network(*, small: bool) -> Iterator[Row]:
    """Target: 1.3 times the step of UNet (c2)."""
    cases = unets(32, 1, width=4, depth=1) if small else unets(EDGE, BATCH)
    for dtype in PRECISIONS:
        yield from side_by_side(cases, dtype=dtype, ways=("eager", "graphed"))


def compiled(*, small: bool) -> Iterator[Row]:
    """Eager, compiled and graphed steps in bfloat16."""
    full = (
        partial(diffusions, EDGE, BATCH),
        partial(unets, EDGE, BATCH),
        partial(stacks, EDGE, BATCH, names=FEW),
    )
    for cases in (partial(diffusions, 32, 1),) if small else full:
        yield from side_by_side(cases(), dtype="bfloat16", ways=WAYS)


def launches(*, small: bool) -> Iterator[Row]:
    """The number of kernels that a layer of depth 6 issues in a training step."""
    for edge in (32,) if small else (512, 64):
        features = torch.randn(BATCH, WIDTH, edge, edge, device=DEVICE, requires_grad=True)
        encoder = KAFEncoder([torch.nn.Identity()], [KAFLayer(WIDTH, depth=1 if small else 6).to(DEVICE)])
        inputs = features, random_keypoints(BATCH, edge)
        for way in WAYS[:2]:
            step = in_way((encoder, inputs), way, dtype="float32")
            step()
            with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as profiler:
                step()
            yield {"map": f"{edge}x{edge}", "way": way, "kernels": sum(e.count for e in profiler.key_averages())}


def detection(*, small: bool) -> Iterator[Row]:
    """Detection and description; target: 1.5 ms for an image."""
    import cv2
    import kornia.feature

    from benchmarks.detection.sifts import natural_images, opencv

    edge = 64 if small else EDGE
    natural = [cv2.resize(image, (edge, edge), interpolation=cv2.INTER_AREA) for image in natural_images()]
    detector, theirs = SIFTDetector(EDGE), opencv(EDGE)
    korn = kornia.feature.SIFTFeatureScaleSpace(EDGE, descriptor_backend="pyramid").to(DEVICE)
    for count in (1,) if small else (1, 8, 32):
        batch = [natural[i % len(natural)] for i in range(count)]
        images = torch.stack([torch.from_numpy(image) for image in batch])[:, None].to(DEVICE)
        floats = (images / 255).split(1)
        with torch.no_grad(), precision("float32"):
            runs: dict[str, Run] = {
                "ours": partial(detector, images),
                "ours, graphed": record(partial(detector, images)),
                "Kornia's pyramid": partial(for_each, korn, floats),
                "OpenCV, on the CPU": partial(for_each, partial(theirs.detectAndCompute, mask=None), batch),
            }
            seconds = compare(runs, repeats=7)
        for name, value in seconds.items():
            yield {
                "SIFT": name,
                "images": count,
                "ms/image": 1e3 * value / count,
                "times ours": value / seconds["ours"],
            }


def tests(*, small: bool) -> Iterator[Row]:
    """The tests that run anywhere, on the GPU; then the tests that need one."""
    anywhere = [f"tests/{name}" for name in ("test_laws.py", "test_fuzz.py", "test_toolchain.py", "detection")]
    runs = {"--device cuda": [*anywhere, "--device", "cuda"], "-k cuda": ["tests", "-k", "cuda"]}
    if small:
        runs = {"--device meta": [anywhere[0], "--device", "meta", "-k", "alone and sampler"]}
    for name, arguments in runs.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        yield {"run": name, "tests": (done.stdout or done.stderr).strip().splitlines()[-1]}


def context(*, small: bool) -> Iterator[Row]:
    """Dice by receptive field (benchmarks.context.by_field), several folds in parallel."""
    flags = ["-m", "benchmarks.context.by_field", "sunnybrook", "--data", "../shared/data/sunnybrook", "--jobs", "5"]
    yield train(flags, small=small)


def table(*, small: bool) -> Iterator[Row]:
    """The few-shot table at the paper's size: whole slices of 256x256 pixels, width 32, five levels, 200 epochs."""
    flags = ["-m", "examples.protocol.cross_validate", "--preset", "sunnybrook", "--data", "../shared/data/sunnybrook"]
    flags += ["--resize", "1", "--patch", "256", "256", "--width", "32", "--levels", "5", "--embed-dim", "256"]
    flags += ["--depth", "6", "--finetune", "--epochs 200 --lr 0.0005", "--labelled", "2", "--jobs", "5"]
    flags += ["--methods", "unet", "unet-c2", "kaf-unet", "kaf-unet --fusion add", "--output", "outputs/table-gpu"]
    yield train(flags, small=small)


def train(flags: Sequence[str], *, small: bool) -> Row:
    """Trains for some minutes. The next call resumes the training."""
    command, environment = [sys.executable, *flags], os.environ | {"PYTHONPATH": str(ROOT)}
    if small:
        command.append("--help")
    try:
        code: object = subprocess.run(command, cwd=ROOT, timeout=SECONDS, env=environment).returncode
    except subprocess.TimeoutExpired:
        code = "stopped, call it again"
    return {"command": " ".join(["python", *flags]), "end": code}


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    part.__name__: part for part in (tests, diffusion, stack, network, compiled, launches, detection, context, table)
}


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; by default all")
    own.add_argument("--small", action="store_true", help="rehearse at the smallest size")
    options = own.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        own.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not CUDA and not options.small:
        own.error("there is no GPU here; --small rehearses on a CPU")
    for name in options.parts or PARTS:
        try:
            rows = told(PARTS[name](small=options.small))
            report(f"gpu-{name}", rows, notes=f"{PARTS[name].__doc__} {NOTES}")
        except ModuleNotFoundError as error:  # noqa: PERF203  # the other parts still run
            print(f"{name}: {reason_of(error)}", file=sys.stderr)


def told(rows: Iterator[Row]) -> Iterator[Row]:
    """Prints each row as it comes."""
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        yield row


if __name__ == "__main__":
    main()
