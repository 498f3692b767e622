// Packed layers on a CPU: the two operations that tsq_layers/native.py compiles and registers.
//
//   y_n = sum over columns of  (scale · code + shift) · x,   shift = −scale · zero, or the offset
//
// One row of input is multiplied in integers (integers.h), few in floats as codes are decoded (floats.h), and of many the
// matrix is made, a block at a time. layout.h says where codes are, weight.h reads grids, vectors.h has the vectors.
//
// N rows of the weight, K columns, G groups a row, W words a row, M rows of input, T tables a row.

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "floats.h"
#include "integers.h"

namespace {

constexpr int64_t BLOCK = 1 << 18;        // weights that are dequantised at a time, and multiplied while in the cache
constexpr int64_t MANY_INPUTS = 256;      // with more rows of input products of larger blocks are faster
constexpr int64_t LARGE_BLOCK = 1 << 21;  // weights

// --- the matrix -----------------------------------------------------------------------------------

// Rows of the weight, in the bits of tsq_layers/grid.py: product and sum are rounded to float32, then once to the type.
template <typename Grid>
void matrix(const Packed& packed, int64_t begin, int64_t end, at::ScalarType type, void* out) {
  const Layout& layout = packed.layout;
  const int64_t blocks = (end - begin + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (layout.columns * ROWS)), [&](int64_t from, int64_t to) {
    Rows rows(packed);
    Buffer<float> values(layout.columns + LANES);
    const int64_t last = std::min(end, begin + to * ROWS) - 1;
    for (int64_t n = begin + from * ROWS, r = 0; n <= last; ++n, r = (r + 1) % ROWS) {
      if (r == 0) rows.read(n);
      // What is too much of a row, less than a vector, the next one replaces, if it is this thread's and as long.
      float* made = type == at::kFloat && n < last && layout.columns >= LANES ? (float*)out + (n - begin) * layout.columns : values.data();
      for (const Piece& piece : layout.pieces) {
        const int32_t* at = rows.at + r * layout.words + piece.word;
        const int64_t grid = piece.group * ROWS + r, vectors = piece.vectors;
        const uint32_t right = piece.right;
        float* into = made + piece.first;
        if constexpr (std::is_same_v<Grid, Affine>) {
          const uint32_t mask = (1u << layout.bits) - 1;
          const float scale = rows.grids.scales[grid], zero = packed.offsets ? 0.0f : rows.grids.zeros[grid];
          const float offset = packed.offsets ? rows.grids.shifts[grid] : 0.0f;
          for (int64_t v = 0; v < vectors; ++v, into += LANES) {
            const Floats value = (floats((load<Words>(at + v * LANES) >> right) & mask) - zero) * scale;
            store(into, packed.offsets ? value + offset : value);
          }
        } else {
          const Grid table(rows.tables.data() + r * packed.count + packed.table(piece), packed.levels);
          for (int64_t v = 0; v < vectors; ++v, into += LANES) store(into, table(load<Words>(at + v * LANES) >> right));
        }
      }
      if (made == values.data()) from_float(made, type, (n - begin) * layout.columns, layout.columns, out);
    }
  });
}

// --- operations -----------------------------------------------------------------------------------

void dequantize_rows(const Packed& packed, int64_t begin, int64_t end, at::ScalarType type, void* out) {
  const auto run = !packed.tables ? matrix<Affine> : packed.levels <= 8 ? matrix<Table<8>> : matrix<Table<16>>;
  run(packed, begin, end, type, out);
}

at::Tensor dequantize(
    const at::Tensor& words, const at::Tensor& grids, const std::optional<at::Tensor>& shifts, int64_t bits,
    int64_t group_size, int64_t columns, at::ScalarType dtype) {
  const Packed packed(words, grids, shifts, bits, group_size, columns);
  at::Tensor out = at::empty({packed.rows, columns}, words.options().dtype(dtype));
  dequantize_rows(packed, 0, packed.rows, dtype, out.mutable_data_ptr());
  return out;
}

// Blocks of rows of the weight are made and multiplied while they are in the cache.
void many(const Packed& packed, const at::Tensor& x, at::Tensor& y) {
  const int64_t columns = packed.layout.columns, block = x.size(0) > MANY_INPUTS ? LARGE_BLOCK : BLOCK;
  const int64_t step = std::max<int64_t>(64, block / columns / 16 * 16);
  at::Tensor buffer = at::empty({std::min(step, packed.rows), columns}, x.options());
  for (int64_t first = 0; first < packed.rows; first += step) {
    const int64_t count = std::min(step, packed.rows - first);
    dequantize_rows(packed, first, first + count, at::kFloat, buffer.mutable_data_ptr());
    at::Tensor part = y.narrow(1, first, count);
    at::mm_out(part, x, buffer.narrow(0, 0, count).t());
  }
}

// As float32, without gaps; what is so already costs nothing.
at::Tensor as_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_contiguous() ? tensor : tensor.to(at::kFloat).contiguous();
}

void few(const Packed& packed, const float* x, int64_t count, const float* bias, float* y) {
  if (count != 1 || !in_integers(packed, x, bias, y)) in_floats(packed, x, count, bias, y);
}

at::Tensor linear(
    const at::Tensor& x, const at::Tensor& words, const at::Tensor& grids, const std::optional<at::Tensor>& shifts,
    const std::optional<at::Tensor>& bias, int64_t bits, int64_t group_size, int64_t columns, int64_t few_rows) {
  const Packed packed(words, grids, shifts, bits, group_size, columns);
  const at::Tensor added = bias ? as_float(*bias) : at::Tensor();
  const int64_t total = x.numel() / columns;
  const at::ScalarType type = x.scalar_type();
  auto shape = x.sizes().vec();
  shape.back() = packed.rows;
  if (total > few_rows) {
    at::Tensor y = at::empty(shape, x.options().dtype(at::kFloat)), y_MN = y.view({total, packed.rows});
    many(packed, as_float(x).view({total, columns}), y_MN);
    if (bias) y_MN.add_(added);
    return type == at::kFloat ? y : y.to(type);
  }
  const at::Tensor from = x.is_contiguous() ? x : x.contiguous();
  const float* added_from = bias ? added.const_data_ptr<float>() : nullptr;
  at::Tensor y = at::empty(shape, x.options());
  if (type == at::kFloat) {
    few(packed, from.const_data_ptr<float>(), total, added_from, y.mutable_data_ptr<float>());
  } else {  // of so few, quicker than by operations of their own
    Buffer<float> wide(total * columns), out(total * packed.rows);
    to_float(from.const_data_ptr(), type, 0, wide.size(), wide.data());
    few(packed, wide.data(), total, added_from, out.data());
    from_float(out.data(), type, 0, out.size(), y.mutable_data_ptr());
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tsq_layers, library) {
  library.def("linear(Tensor x, Tensor words, Tensor grids, Tensor? shifts, Tensor? bias, int bits, int group_size, int columns, int few_rows) -> Tensor");
  library.def("dequantize(Tensor words, Tensor grids, Tensor? shifts, int bits, int group_size, int columns, ScalarType dtype) -> Tensor");
  library.impl("linear", c10::DispatchKey::CPU, TORCH_FN(linear));
  library.impl("dequantize", c10::DispatchKey::CPU, TORCH_FN(dequantize));
}
