"""Names the tensors in a batch: ``dict[str, torch.Tensor]`` with N atoms, E edges and B structures."""

POSITIONS = "positions"
"""(N, 3) float: atomic positions in Å."""

SPECIES = "species"
"""(N,) int64: index of each atom's species in the model's species list."""

ATOMIC_NUMBERS = "atomic_numbers"
"""(N,) int64: atomic numbers."""

EDGE_INDEX = "edge_index"
"""(2, E) int64: row 0 is the source j, row 1 the target i; messages go from j to i."""

CELL_SHIFTS = "cell_shifts"
"""(E, 3) float: integer multiples S of the cell vectors; the edge vector is r_j + S @ cell - r_i."""

CELL = "cell"
"""(B, 3, 3) float: cell vectors in Å as rows; zeros for a structure without a cell."""

PBC = "pbc"
"""(B, 3) bool: periodicity along each cell vector."""

BATCH = "batch"
"""(N,) int64: index of the structure that each atom belongs to."""

ENERGY = "energy"
"""(B,) float64: energy in eV. float32 would round all-electron energies by eV."""

FORCES = "forces"
"""(N, 3) float: forces in eV/Å."""

STRESS = "stress"
"""(B, 3, 3) float: (1/V) dE/d(strain) in eV/Å³, positive under tension; NaN for a structure without a label."""

SAMPLE_INDEX = "sample_index"
"""(B,) int64: index of each structure in the dataset; in the batches of test and prediction data only."""

WEIGHT = "weight"
"""(B,) float: factor of each structure's terms in the loss; in the batches of data that has such weights only."""

TASK = "task"
"""(B,) int64: index of the task (data set, level of theory) of each structure; in the batches of data with tasks."""

CHARGE = "charge"
"""(B,) int64: total charge of each structure in elementary charges; in the batches of data with tasks."""

SPIN = "spin"
"""(B,) int64: number of unpaired electrons of each structure; in the batches of data with tasks."""
