"""The mathematics of one matrix: masks, Hessians, damping, least squares. No `nn.Module`, no model, no files."""
