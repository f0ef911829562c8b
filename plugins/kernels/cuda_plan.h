// Where a call keeps its matrices, and over how many blocks it spreads a head. Decided on the host, followed by the
// kernels; nothing here needs CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plugins/kernels/neural_memory_cuda.h"
#include "plugins/kernels/rounding.h"

namespace titans::kernels::cuda {

inline constexpr int kMostBlocks = 8;  // that share a head: a cluster's portable size
inline constexpr int kPadding = 32;    // rows and columns of buffers are multiples of it
inline constexpr int kMostRows = 64;   // tokens that are worked on at a time
inline constexpr int kReductionWords = 64;

TITANS_BOTH constexpr int pad(int size) { return (size + kPadding - 1) / kPadding * kPadding; }
// Elements from row to row of a matrix: 16 bytes more than the padded row, so that a column's elements do not all lie
// in the same banks of shared memory.
TITANS_BOTH constexpr int stride_of(int columns, int element_bytes) { return pad(columns) + 16 / element_bytes; }

// Of W and S, float32, which products mostly read down their columns: four rows of eight columns in 32 banks.
TITANS_BOTH constexpr int weight_stride(int columns) { return pad(columns) + 8; }

// Bytes from the start of the block's shared memory, or of its part of the workspace.
struct Place {
  std::uint32_t offset = 0;
  bool shared = true;
};

// A matrix of the packed row as its memory_dtype holds it: where elements and scales begin, in words, and of its rows
// the elements and the blocks that share a scale.
struct Field {
  int elements, scales, columns, blocks;
};

// How an element's bits become a number: magnitude and sign go to their places in a float32, bits of `flip` change
// over, then comes value * factor + offset. What is as large as `beyond` is infinite, what is larger no number.
struct Decoder {
  int per_word, word_shift, element_bits;  // elements of a word, and the logarithm of that
  std::uint32_t magnitude, sign;
  int magnitude_shift, sign_shift;
  std::uint32_t flip;
  float factor, offset, beyond;
};

// How the magnitude of a number becomes an element's bits, which count in their order: below `least_normal` they are
// steps of 1 / per_least, from there on a float32's without the lost ones and less the difference of the biases.
struct Encoder {
  float least_normal, per_least;
  int lost_bits;
  std::uint32_t biases, most, nan;
  float largest;  // what a block's largest is scaled to
};

// The configuration as kernels want it: plain integers. Offsets are words of the packed row.
struct Model {
  int depth, chunk, width;
  int widths[kMaxDepth + 1];
  Field w[kMaxDepth], s[kMaxDepth], ew[kMaxDepth], es[kMaxDepth];  // the last two with rounding "error_feedback"
  int layer_input[kMaxDepth], output_grad[kMaxDepth];
  int e, a, m, f, beta, chunk_updates, row;
  bool update, aligned, gelu, residual, layer_norm, scaled;
  MemoryDtype memory_dtype;
  Decoder decoder;
  Encoder encoder;
  Rounding rounding;
  std::uint32_t seed;

  // What one of `blocks` blocks holds of layer i: the input of the last layer is dealt out, `share` of it to each, and
  // with it the output of the layer before.
  TITANS_BOTH int share(int blocks) const {
    const int groups_of_columns = (widths[depth - 1] + kPadding - 1) / kPadding;
    return (groups_of_columns + blocks - 1) / blocks * kPadding;
  }
};

Model make_model(const Configuration& configuration);

// Everything that a block of threads keeps while it works on a head.
struct Plan {
  int blocks = 1;        // that share a head
  bool cluster = false;  // and whether they are a cluster
  int share = 0;         // Model::share(blocks)
  int rows = 0;          // tokens that are worked on at a time
  int resident = 1;      // blocks that fit on a multiprocessor side by side, at least
  bool shared = true;    // whether all but what is exchanged is in shared memory
  bool staged = true;    // whether W and S are copied to where w and s say, or used where they are
  Place w[kMaxDepth], s[kMaxDepth], layer_input[kMaxDepth], output_grad[kMaxDepth], x[kMaxDepth];
  Place q, scores, coefficients, vectors, exchange;
  std::uint32_t shared_bytes = 0;
  std::uint32_t workspace_bytes = 0;  // of one block
};

enum class Kind : std::uint8_t { kBlocks, kToken, kRead };

// A call of one kind: `work` heads, or parts of heads that no other work depends on.
struct Request {
  Kind kind;
  int operand_bytes;  // of the operands of matrix products
  std::int64_t work;
};

Plan make_plan(const Model& model, const CudaDevice& device, const Request& request);
// How many groups of plan.blocks blocks run at once; they take turns with the work.
int groups_of(const Plan& plan, const CudaDevice& device, std::int64_t work);
// Bytes that no call of the kind with at most this much work exceeds, whatever plan it gets.
std::size_t most_workspace(const Model& model, const CudaDevice& device, const Request& request);
// Of that, in front: a counter for each group.
std::size_t counter_bytes(int groups);

std::string describe(const Plan& plan);

}  // namespace titans::kernels::cuda
