"""A CUDA device that is not there: what the GPU path launches, copies and waits for, without a GPU.

`guard.load()` comes before torch is imported. Under `FakeTensorMode` forward and backward then run on "cuda" with
shapes, strides and dtypes, and no numbers; `recorder.Recorder` lists what a GPU would be asked for, `inductor` has
torch.compile write its code for an H100, and `cubins` compiles that code for GPUs with the assembler that Triton brings
along.

    guard       the device, as a small C++ library
    recorder    kernels with their bytes and FLOPs, copies between host and device, reads that wait for the device
    attention   SDPA as the fused kernels that a GPU would choose
    subjects    the network's blocks with inputs of a preset's sizes
    inductor    torch.compile for an H100: kernels, bytes, launches
    cubins      registers and spills of Triton's kernels
    roofline    seconds of a kernel on an H100, from bytes and FLOPs
"""
