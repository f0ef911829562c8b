// Runs a bare CUDA kernel of an operator without a packed row, for tests against independent oracles.
//
//   node_run_cuda CASE.safetensors OUT.safetensors [--in-place]
//
// CASE has the operands of one call by name. Its metadata are `operator` ("CachedAttention", "CausalConvolution" or
// "HyperConnection"), `attributes` (the node's attributes as JSON) and `calls` ("1"). OUT receives the outputs as
// float32, one after the other in their order. With --in-place, each state is updated in its input's buffer. Stdout has
// a line of JSON; `status` is the error that the device reports, or empty.
#include <algorithm>
#include <fstream>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "plugins/kernels/cached_attention_cuda.h"
#include "plugins/kernels/causal_convolution_cuda.h"
#include "plugins/kernels/cuda_status.h"
#include "plugins/kernels/hyper_connection_cuda.h"
#include "plugins/kernels/node_contracts.h"
#include "plugins/tools/case_file.h"
#include "plugins/tools/device_memory.h"

namespace {

using namespace titans::kernels;
using nlohmann::json;

class Buffers {
 public:
  // A tensor in device memory with the contents of `host`, or with arbitrary ones if it is null.
  Tensor add(Tensor like, std::size_t bytes, const void* host) {
    buffers_.push_back(std::make_unique<DeviceBuffer>(bytes));
    if (host != nullptr && bytes > 0) buffers_.back()->upload(host);
    like.data = buffers_.back()->data();
    return like;
  }
  std::vector<std::byte> contents(const Tensor& tensor) const {
    for (const auto& each : buffers_) {
      if (each->data() != tensor.data) continue;
      std::vector<std::byte> bytes(each->bytes());
      if (!bytes.empty()) each->download(bytes.data());
      return bytes;
    }
    return {};
  }

 private:
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

// Whether the node has the output. Only HyperConnection's beta is optional: its column of the projection may be
// missing.
bool has_output(const CaseFile& file, std::size_t which) {
  if (file.op != hyper_connection::kOperator || which != hyper_connection::kBeta) return true;
  return file.tensors.at("projection").shape[1] == file.tensors.at("residuals").shape[2] + 2;
}

template <class Contract>
void run(const CaseFile& file, const std::string& output, bool in_place) {
  CudaDevice device;
  throw_error(CudaDevice::current(device));
  std::string error;
  const auto kernel = make_cuda_kernel(file.configuration<typename Contract::Configuration>(), device, error);
  throw_error(error);
  Buffers buffers;
  typename Contract::Operands operands;
  for (std::size_t i = 0; i < Contract::kInputs; ++i) {
    const auto found = file.tensors.find(Contract::kNames[i]);
    if (found == file.tensors.end()) continue;
    operands[i] = buffers.add(found->second, file.memory.at(found->first).bytes(), found->second.data);
  }
  for (std::size_t i = Contract::kInputs; i < operands.size(); ++i) {
    const Tensor like = Contract::output(operands, i);
    if (!like.present() || !has_output(file, i)) continue;
    const auto* pair = std::find_if(Contract::kInPlace.begin(), Contract::kInPlace.end(),
                                    [&](const InPlace& each) { return each.output == i; });
    operands[i] = in_place && pair != Contract::kInPlace.end()
                      ? operands[pair->input]
                      : buffers.add(like, static_cast<std::size_t>(like.elements()) * sizeof(float), nullptr);
  }
  DeviceBuffer word(sizeof(std::int32_t));
  std::int32_t status = 0;
  word.upload(&status);
  throw_error(kernel->run(operands, static_cast<std::int32_t*>(word.data()), work_stream()));
  synchronize();
  word.download(&status);
  std::ofstream out(output, std::ios::binary);
  for (std::size_t i = Contract::kInputs; i < operands.size(); ++i) {
    if (!operands[i].present()) continue;
    const std::vector<std::byte> bytes = buffers.contents(operands[i]);
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  if (!out.flush()) throw_error(failure("run", "E1001", "a file cannot be written: " + output, "check the disk"));
  std::cout << json{{"status", status_message(status)}}.dump() << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 3) throw_error(failure("run", "E0103", "missing argument CASE or OUT", "give two files"));
    const CaseFile file(argv[1]);
    const bool in_place = argc > 3 && std::string(argv[3]) == "--in-place";
    if (file.op == cached_attention::kOperator) {
      run<AttentionContract>(file, argv[2], in_place);
    } else if (file.op == causal_convolution::kOperator) {
      run<ConvolutionContract>(file, argv[2], in_place);
    } else {
      run<ConnectionContract>(file, argv[2], in_place);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
