"""Integer products on Hopper GPUs by the copy engine and specialised warps, where the general kernels leave tensor cores waiting."""
