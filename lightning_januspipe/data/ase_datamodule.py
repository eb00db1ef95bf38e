"""A LightningDataModule of structures in files that ASE reads."""

from __future__ import annotations

from typing import Any, Literal

from torch.utils.data import Subset
from typing_extensions import override

from lightning_januspipe.data.datamodule import SampleDataset, StructureDataModule
from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.splits import Split, check_size, split_indices
from lightning_januspipe.data.structures import validate_species


class ASEDataModule(StructureDataModule):
    """Reads structures from files in the formats of ASE: extended XYZ, ASE databases (``.db``) and others.

    Validation and test data are read from files of their own or split off ``train_file``. The split depends on ``seed``
    and the number of structures only, so that it is the same in every process.

    .. code-block:: yaml

        data:
          class_path: lightning_januspipe.data.ASEDataModule
          init_args:
            train_file: water.extxyz
            val_size: 0.1
            cutoff: 5.0
            batch_size: 4
    """

    def __init__(
        self,
        train_file: str,
        *,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        seed: int = 0,
        cutoff: float = 5.0,
        species: list[str] | Literal["auto"] = "auto",
        energy_key: str = "energy",
        forces_key: str = "forces",
        stress_key: str | None = "stress",
        dtype: Literal["float32", "float64"] | None = None,
        **loader: Any,
    ) -> None:
        """Keep the options; ``setup`` reads the files.

        Args:
            train_file: File with training structures.
            val_file: File with validation structures.
            test_file: File with test structures.
            predict_file: File with structures to predict, which need no labels. Default: the test data.
            train_size: Number (int) or fraction (float between 0 and 1) of the structures in ``train_file`` to train
                on; None for all that the other splits leave.
            val_size: Number or fraction of the structures in ``train_file`` for validation, instead of ``val_file``.
            test_size: Number or fraction of the structures in ``train_file`` for testing, instead of ``test_file``.
            seed: Seed of the split.
            cutoff: Cutoff of the neighbour lists in Å.
            species: Chemical symbols in the model's order; ``"auto"`` for those in ``train_file``, sorted by atomic
                number.
            energy_key: Name of the energy label (eV).
            forces_key: Name of the forces label (eV/Å).
            stress_key: Name of the stress label (eV/Å³); None to read no stress.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` in ``setup``.
            loader: Options of :class:`StructureDataModule`.

        Raises:
            ValueError: A size is neither a number nor a fraction, or a file is given for the same split.
        """
        super().__init__(**loader)
        for name, file, size in (("val", val_file, val_size), ("test", test_file, test_size)):
            if file is not None and size is not None:
                raise ValueError(f"{name}_file={file!r} and {name}_size={size} are both given; expected one of them")
        self._sizes = {"train": train_size, "val": val_size, "test": test_size}
        for name, size in self._sizes.items():
            check_size(f"{name}_size", size)
        self._files: dict[str, str | None] = {"val": val_file, "test": test_file, "predict": predict_file}
        self._train_file = train_file
        self._seed = seed
        self._cutoff = cutoff
        self._species = None if species == "auto" else validate_species(species)
        self._energy_key = energy_key
        self._forces_key = forces_key
        self._stress_key = stress_key
        self._dtype = dtype
        self._train_source: StructureDataset | None = None

    @property
    @override
    def species(self) -> list[str]:
        """Chemical symbols in the order of the species index; ``"auto"`` reads ``train_file``."""
        return list(self._species if self._species is not None else self._source().species)

    @override
    def build_dataset(self, split: Split) -> SampleDataset | None:
        """Make the dataset of one split.

        Raises:
            ValueError: A file or the labels of a structure are not usable, or the sizes of the splits exceed the
                number of structures.
        """
        file = self._files.get(split)
        if file is not None:
            return self._read(file, self.species, require_labels=split != "predict")
        if split == "predict":
            return self.dataset("test")
        if split != "train" and self._sizes[split] is None:
            return None
        source = self._source()
        indices = split_indices(
            len(source),
            train=self._sizes["train"],
            val=self._sizes["val"],
            test=self._sizes["test"],
            seed=self._seed,
        )[split]
        return Subset(source, indices)

    def _source(self) -> StructureDataset:
        if self._train_source is None:
            self._train_source = self._read(self._train_file, self._species, require_labels=True)
        return self._train_source

    def _read(self, file: str, species: list[str] | None, *, require_labels: bool) -> StructureDataset:
        return StructureDataset(
            file,
            cutoff=self._cutoff,
            species="auto" if species is None else species,
            energy_key=self._energy_key,
            forces_key=self._forces_key,
            stress_key=self._stress_key,
            dtype=self._dtype,
            require_labels=require_labels,
            precompute=self._precompute,
        )
