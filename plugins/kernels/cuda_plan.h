// Decides where a call keeps its matrices and how many thread blocks share a head. The host decides and the kernels
// follow; this file does not need CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/neural_memory_cuda.h"
#include "plugins/kernels/rounding.h"

namespace titans::kernels::cuda {

inline constexpr int kMostBlocks = 8;  // that share a head; 8 is the portable cluster size
inline constexpr int kPadding = 32;    // rows and columns of buffers are multiples of it
inline constexpr int kMostRows = 64;   // tokens processed at a time
inline constexpr int kReductionWords = 64;

TITANS_BOTH constexpr int pad(int size) { return (size + kPadding - 1) / kPadding * kPadding; }
// Elements between two rows of a matrix. The padding of 16 bytes spreads a column over the banks of shared memory.
TITANS_BOTH constexpr int stride_of(int columns, int element_bytes) { return pad(columns) + 16 / element_bytes; }

// The stride of W and S in float32. Matmuls mostly read down their columns: four rows of eight columns fill 32 banks.
TITANS_BOTH constexpr int weight_stride(int columns) { return pad(columns) + 8; }

// An offset in bytes into the block's shared memory, or into its part of the workspace.
struct Place {
  std::uint32_t offset = 0;
  bool shared = true;
};

// A matrix in the packed row. `elements` and `scales` are offsets in words. `blocks` is the number of scale blocks per
// row.
struct Field {
  int elements, scales, columns, blocks;
};

// Turns an element's bits into a number. Magnitude and sign are shifted into a float32 and the bits of `flip` are
// inverted. The value is then value * factor + offset. A magnitude equal to `beyond` is infinite, a larger one is NaN.
struct Decoder {
  int per_word, word_shift, element_bits;  // elements per word, and its logarithm
  std::uint32_t magnitude, sign;
  int magnitude_shift, sign_shift;
  std::uint32_t flip;
  float factor, offset, beyond;
};

// Turns a magnitude into an element's bits; both have the same order. Below `least_normal` the bits count steps of 1 /
// per_least. From there on they are a float32's upper bits, minus the difference of the exponent biases.
struct Encoder {
  float least_normal, per_least;
  int lost_bits;
  std::uint32_t biases, most, nan;
  float largest;  // a block's largest element is scaled to this
};

// How the elements of W and S are kept in a packed row.
struct Codec {
  bool scaled;
  MemoryDtype memory_dtype;
  Decoder decoder;
  Encoder encoder;
  Rounding rounding;
  std::uint32_t seed;
};

Codec make_codec(const MemoryConfiguration& configuration);
// The field of tensor `tensor` at `offset`.
Field make_field(const MemoryConfiguration& configuration, int tensor, std::int64_t offset);

// The configuration as plain integers for the kernels. Offsets are in words of the packed row.
struct Model : Codec {
  int depth, chunk, width;
  int widths[kMaxDepth + 1];
  Field w[kMaxDepth], s[kMaxDepth], ew[kMaxDepth], es[kMaxDepth];  // the last two with rounding "error_feedback"
  int layer_input[kMaxDepth], output_grad[kMaxDepth];
  int e, a, m, f, beta, chunk_updates, row;
  bool update, aligned, gelu, residual, layer_norm;

  // The columns that each of `blocks` blocks holds: the last layer's inputs are split into shares, and so are the
  // previous layer's outputs.
  TITANS_BOTH int share(int blocks) const {
    const int groups_of_columns = (widths[depth - 1] + kPadding - 1) / kPadding;
    return (groups_of_columns + blocks - 1) / blocks * kPadding;
  }
};

Model make_model(const Configuration& configuration);

// Where a thread block keeps its data while it works on a head.
struct Plan {
  int blocks = 1;        // blocks that share a head
  bool cluster = false;  // whether these blocks form a cluster
  int share = 0;         // Model::share(blocks)
  int rows = 0;          // tokens processed at a time
  int resident = 1;      // blocks that fit on a multiprocessor together, at least
  bool shared = true;    // whether everything except the exchange area is in shared memory
  bool staged = true;    // whether W and S are copied to w and s, or used in place
  Place w[kMaxDepth], s[kMaxDepth], layer_input[kMaxDepth], output_grad[kMaxDepth], x[kMaxDepth];
  Place q, scores, coefficients, vectors, exchange;
  std::uint32_t shared_bytes = 0;
  std::uint32_t workspace_bytes = 0;  // per block
};

enum class Kind : std::uint8_t { kBlocks, kToken, kRead };

// The size and type of a call. `work`: the number of heads, or of independent parts of heads.
struct Request {
  Kind kind;
  int operand_bytes;  // of matmul operands
  std::int64_t work;
};

Plan make_plan(const Model& model, const CudaDevice& device, const Request& request);
// The number of groups of plan.blocks blocks that run at once and share the work.
int groups_of(const Plan& plan, const CudaDevice& device, std::int64_t work);
// An upper bound in bytes for the workspace of any such call with at most this much work, for every plan.
std::size_t most_workspace(const Model& model, const CudaDevice& device, const Request& request);
// The bytes in front of the workspace: a counter per group.
std::size_t counter_bytes(int groups);

std::string describe(const Plan& plan);

}  // namespace titans::kernels::cuda
