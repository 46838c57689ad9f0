"""The door to `deeplab_fast._C`: loads it at the first call, and says what is built and what is not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

NOT_BUILT = "deeplab_fast._C is not built"
FLOAT_DTYPES = (torch.float32, torch.bfloat16)  # of the CPU kernels
CUDA_FLOAT_DTYPES = (*FLOAT_DTYPES, torch.float16)  # csrc/types.h: DType
FEWEST_CHANNELS = 16  # of a depthwise gradient: a vector of the widest instruction set; fewer are padded
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # csrc/confusion_matrix.h: LabelType
ACTIVATIONS = ("none", "relu", "relu6")  # csrc/types.h: Activation

conversions = 0  # how many tensors `channels_last` had to copy in this process


@functools.cache
def load() -> ModuleType | None:
    """`deeplab_fast._C`, or None where it was not built. A module that is there and does not load raises."""
    # torch is imported above, so that the module's libgomp.so.1 is the one that torch has already loaded.
    if importlib.util.find_spec("deeplab_fast._C") is None:
        return None
    return importlib.import_module("deeplab_fast._C")


def kernels() -> ModuleType:
    """`deeplab_fast._C`, for a launcher whose why-not has already said that it is there."""
    module = load()
    if module is None:
        raise RuntimeError(NOT_BUILT)
    return module


def cpu_why_not(*tensors: Tensor | None) -> str | None:
    """None where the CPU kernels take these tensors, all of one dtype of FLOAT_DTYPES on the CPU, else the reason."""
    device = tensors[0].device
    if device.type != "cpu":
        return f"there is no native kernel of it for the device {device}"
    return why_not(device) or _dtypes_why_not(tensors, FLOAT_DTYPES, "the CPU kernels take float32 or bfloat16")


def float_why_not(*tensors: Tensor | None) -> str | None:
    """The same for an op with kernels of both kinds; those of CUDA take CUDA_FLOAT_DTYPES."""
    device = tensors[0].device
    if device.type != "cuda":
        return cpu_why_not(*tensors)
    taken = "the CUDA kernels take float32, bfloat16 or float16"
    return why_not(device) or _dtypes_why_not(tensors, CUDA_FLOAT_DTYPES, taken)


def _dtypes_why_not(tensors: tuple[Tensor | None, ...], dtypes: tuple[torch.dtype, ...], taken: str) -> str | None:
    given = {x.dtype for x in tensors if x is not None}
    if len(given) == 1 and given <= set(dtypes):
        return None
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in given))
    return f"{taken}, one for all, and got {names}"


def device_and_stream(x: Tensor) -> tuple[int, int]:
    """What every CUDA launcher takes last: the index of x's device, and torch's current stream of it as a number."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, H, W) in packed channels-last memory: itself, or a copy that `conversions` counts."""
    global conversions
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    conversions += 1
    return x.contiguous(memory_format=torch.channels_last)


def why_not(device: torch.device) -> str | None:
    """None where native kernels run on this device, else the reason."""
    module = load()
    if module is None:
        return f"{NOT_BUILT} (reinstall with a C++ compiler and without DEEPLAB_FAST_NATIVE=0)"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no native kernels for the device {device}"
    return cuda_why_not(device)


def cuda_why_not(device: torch.device) -> str | None:
    """The same for a CUDA device, once `_C` is there."""
    module = kernels()
    if not module.cuda:
        return "deeplab_fast._C was built without CUDA (nvcc was not found, or DEEPLAB_FAST_CUDA=0)"
    if reason := module.cuda_why_not():
        return f"the CUDA runtime {module.cuda} of deeplab_fast._C cannot be used: {reason}"
    if torch.version.hip:
        return "torch is a ROCm build"
    return chip_why_not(torch.cuda.get_device_capability(device), module.cuda_architectures)


def chip_why_not(capability: tuple[int, int], architectures: str) -> str | None:
    """Whether code for `architectures` (such as "80,86,90", the last also as PTX) runs on a chip."""
    built = [divmod(int(arch), 10) for arch in architectures.split(",")]
    # Machine code runs on later minors of its own major; PTX on everything later.
    if any(major == capability[0] and minor <= capability[1] for major, minor in built) or capability >= built[-1]:
        return None
    chip = f"sm_{capability[0]}{capability[1]}"
    return f"deeplab_fast._C was built for sm {architectures}, and the device is {chip}"


def status() -> str:
    """One line for the commands and for `python -m deeplab_fast.info`."""
    module = load()
    if module is None:
        return f"native kernels: none, {why_not(torch.device('cpu'))}; the ops run in plain PyTorch"
    cuda = f"CUDA {module.cuda} for sm {module.cuda_architectures}" if module.cuda else "no CUDA"
    openmp = "OpenMP" if module.openmp else "one thread"
    return f"native kernels: {module.instruction_set()}, {openmp}, {cuda}, built with {module.compiler}"
