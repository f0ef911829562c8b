// Newton-Schulz iteration of one thread block towards the nearest semi-orthogonal matrix.
//
// The iterate Y is always tall, large x small: it is X^T if X is wide. A step is
//
//   A = Y^T Y          P = a I + b A + c A A          Y <- Y P
//
// A and P are symmetric but for rounding, so all operands but those of Y^T Y are read along rows. Rows and columns are
// zero-padded to whole tiles, and the padding stays zero, so tiles need no bounds checks.
#pragma once

#include "plugins/kernels/cuda_product.cuh"

namespace titans::kernels::cuda {

inline constexpr float kNewtonSchulzA = 3.4445F, kNewtonSchulzB = -4.7750F, kNewtonSchulzC = 2.0315F;
inline constexpr float kNormFloor = 1e-7F;

// The scratch of an iteration.
struct NewtonSchulz {
  float *first, *second, *gram, *step;  // two iterates, two squares
};

// Element (i, j) of the result at data[i * row_stride + j * column_stride].
struct Orthogonal {
  const float* data;
  int row_stride, column_stride;
  __device__ float operator()(int i, int j) const { return data[i * row_stride + j * column_stride]; }
};

// `matrix` is in x out without gaps; `norm` is its Frobenius norm. V: the operands of the matmuls (cuda_device.cuh).
// All threads of the block call it, and a barrier has passed when it returns.
template <class V>
__device__ Orthogonal orthogonalise(const NewtonSchulz& scratch, const float* matrix, int in, int out, float norm,
                                    int steps) {
  const bool upright = in >= out;
  const int large = upright ? in : out, small = upright ? out : in;
  const int rows = pad(large), columns = pad(small), stride = stride_of(small, sizeof(float));
  float *y = scratch.first, *next = scratch.second, *gram = scratch.gram, *step = scratch.step;
  // Like PyTorch's clamp, this keeps a NaN.
  const float by = 1.0F / (norm < kNormFloor ? kNormFloor : norm);
  for (int at = thread_index(); at < rows * columns; at += kThreads) {
    const int i = at / columns, j = at % columns;
    const bool inside = i < large && j < small;
    y[i * stride + j] = inside ? matrix[upright ? i * out + j : j * out + i] * by : 0.0F;
  }
  sync_block();
  for (int each = 0; each < steps; ++each) {
    const AlongColumns<float> down{y, stride};
    multiply<V>(columns, columns, rows, down, down, [&](int i, int j, float sum) { gram[i * stride + j] = sum; });
    sync_block();
    const AlongRows<float> a{gram, stride};
    multiply<V>(columns, columns, columns, a, a, [&](int i, int j, float sum) {
      const float diagonal = i == j && i < small ? kNewtonSchulzA : 0.0F;
      step[i * stride + j] = kNewtonSchulzC * sum + kNewtonSchulzB * gram[i * stride + j] + diagonal;
    });
    sync_block();
    multiply<V>(rows, columns, columns, AlongRows<float>{y, stride}, AlongRows<float>{step, stride},
                [&](int i, int j, float sum) { next[i * stride + j] = sum; });
    sync_block();
    float* swapped = y;
    y = next;
    next = swapped;
  }
  return upright ? Orthogonal{y, stride, 1} : Orthogonal{y, 1, stride};
}

}  // namespace titans::kernels::cuda
