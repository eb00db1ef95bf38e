"""Writes the C++ code by which an exported file checks its arguments, and copies those that are not contiguous."""

from __future__ import annotations

import torch

from lightning_januspipe import keys
from lightning_januspipe.compiled.compiled_potential import INPUTS

_SIZES = ("N", "E", "B")

_CODE = """
static bool _check_aoti_runtime_check_inputs_env() {
    return false;  // of torch's own checks, which the ones below replace
}

struct JanusInput {
    const char* name;
    int32_t dtype;
    const char* type_name;
    std::vector<int64_t> shape;  // -1, -2 and -3 stand for N, E and B
    const char* shape_name;
};

static std::string janus_shape(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t dim = 0; dim < shape.size(); ++dim) {
        text += (dim ? ", " : "") + std::to_string(shape[dim]);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

template <typename T>
static const T* janus_values(AtenTensorHandle tensor) {
    void* data = nullptr;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
    return static_cast<const T*>(data);
}

static void janus_require_range(
    const char* name, const int64_t* values, int64_t num, int64_t upper, const char* upper_name) {
    for (int64_t place = 0; place < num; ++place) {
        if (values[place] < 0 || values[place] >= upper) {
            throw std::runtime_error(
                std::string(name) + " has the value " + std::to_string(values[place]) + "; expected 0 to " +
                std::to_string(upper - 1) + ": " + upper_name);
        }
    }
}

AOTI_NOINLINE static void __check_inputs_outputs(AtenTensorHandle* input_handles, AtenTensorHandle* output_handles) {
    const std::vector<JanusInput> inputs = {
        @INPUTS@
    };
    std::vector<int64_t> sizes = {-1, -1, -1};
    for (size_t index = 0; index < inputs.size(); ++index) {
        const JanusInput& input = inputs[index];
        AtenTensorHandle tensor = input_handles[index];
        int32_t dtype = 0, device = 0;
        int64_t num_dims = 0, *given = nullptr;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &num_dims));
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &given));
        if (dtype != input.dtype) {
            throw std::runtime_error(std::string(input.name) + " has another type; expected " + input.type_name);
        }
        if (device != aoti_torch_device_type_@DEVICE@()) {
            throw std::runtime_error(std::string(input.name) + " is on another device; expected @DEVICE@");
        }
        std::vector<int64_t> shape(given, given + num_dims);
        bool fits = shape.size() == input.shape.size();
        for (size_t dim = 0; fits && dim < shape.size(); ++dim) {
            int64_t expected = input.shape[dim];
            if (expected < 0) {
                int64_t& size = sizes[-expected - 1];
                size = size < 0 ? shape[dim] : size;
                expected = size;
            }
            fits = shape[dim] == expected;
        }
        if (!fits) {
            throw std::runtime_error(
                std::string(input.name) + " has shape " + janus_shape(shape) + "; expected " + input.shape_name +
                ", with sizes of the arguments before it");
        }
    }
    for (size_t index = 0; index < inputs.size(); ++index) {
        bool contiguous = false;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(input_handles[index], &contiguous));
        if (!contiguous) {
            @CONTIGUOUS@
        }
    }
    @VALUES@
}
"""

_COPIES = """
            int64_t* shape = nullptr;
            AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(input_handles[index], &shape));
            int64_t num_dims = inputs[index].shape.size();
            std::vector<int64_t> strides(num_dims, 1);
            for (int64_t dim = num_dims - 1; dim > 0; --dim) {
                strides[dim - 1] = strides[dim] * shape[dim];
            }
            AtenTensorHandle copy = nullptr;
            AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
                num_dims, shape, strides.data(), inputs[index].dtype, aoti_torch_device_type_cpu(), 0, &copy));
            AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy, input_handles[index], 0));
            AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(input_handles[index]));
            input_handles[index] = copy;
"""

_REFUSES = """
            throw std::runtime_error(std::string(inputs[index].name) + " is not contiguous");
"""

_VALUES = """
    const int64_t num_atoms = sizes[0], num_edges = sizes[1];
    const int64_t* edge_index = janus_values<int64_t>(input_handles[@EDGE_INDEX@]);
    const int64_t* batch = janus_values<int64_t>(input_handles[@BATCH@]);
    const @FLOAT@* shifts = janus_values<@FLOAT@>(input_handles[@CELL_SHIFTS@]);
    janus_require_range(
        "species", janus_values<int64_t>(input_handles[@SPECIES@]), num_atoms, @NUM_SPECIES@,
        "an index in the list of species");
    janus_require_range("edge_index", edge_index, 2 * num_edges, num_atoms, "an index of an atom");
    janus_require_range("batch", batch, num_atoms, sizes[2], "an index of a structure");
    for (int64_t edge = 0; edge < num_edges; ++edge) {
        if (batch[edge_index[edge]] != batch[edge_index[num_edges + edge]]) {
            throw std::runtime_error("edge " + std::to_string(edge) + " joins atoms of two structures");
        }
    }
    for (int64_t place = 0; place < 3 * num_edges; ++place) {
        if (shifts[place] != std::floor(shifts[place])) {
            throw std::runtime_error(
                "cell_shifts has the value " + std::to_string(shifts[place]) +
                "; expected whole numbers of cell vectors");
        }
    }
"""


def code_of_checks(num_species: int, floats: torch.dtype, device: str) -> str:
    """Returns C++ that defines what :func:`~lightning_januspipe.compiled.torch_internals.checking_inputs` calls.

    It raises an error for arguments of other types, shapes and devices. On the CPU it copies arguments that are not
    contiguous, and raises an error for indices that are out of range, for edges between structures, and for shifts that
    are not whole; on a GPU, where nothing reads values before the compiled code does, it refuses arguments that are not
    contiguous.

    Args:
        num_species: Number of species of the potential.
        floats: Type of the floating-point arguments.
        device: Type of the device that the file is for.
    """
    on_cpu = device == "cpu"
    values = _VALUES.replace("@NUM_SPECIES@", str(num_species))
    values = values.replace("@FLOAT@", {torch.float64: "double", torch.float32: "float"}[floats])
    for index, name in enumerate(INPUTS):
        if name in (keys.SPECIES, keys.EDGE_INDEX, keys.CELL_SHIFTS, keys.BATCH):
            values = values.replace(f"@{name.upper()}@", str(index))
    return (
        _CODE.replace("@INPUTS@", ",\n        ".join(_input(name, floats) for name in INPUTS))
        .replace("@CONTIGUOUS@", (_COPIES if on_cpu else _REFUSES).strip())
        .replace("@VALUES@", values.strip() if on_cpu else "")
        .replace("@DEVICE@", device)
    )


def _input(name: str, floats: torch.dtype) -> str:
    """Returns the entry of an argument in the table of the C++ code."""
    shape, kind = INPUTS[name]
    dtype = str(floats).removeprefix("torch.") if kind == "float" else kind
    sizes = ", ".join(str(-1 - _SIZES.index(n)) if isinstance(n, str) else str(n) for n in shape)
    words = f"({', '.join(str(n) for n in shape)}{',' if len(shape) == 1 else ''})"
    return f'{{"{name}", aoti_torch_dtype_{dtype}(), "{dtype}", {{{sizes}}}, "{words}"}}'
