// Runs the bare CUDA kernel over calls from a file, for tests against independent oracles and for timing without a
// runtime.
//
//   neural_memory_run_cuda CASE.safetensors OUT.bin [--two-buffers] [--misaligned] [--keep-going]
//                          [--initial-weights]
//                          [--time REPEATS [--graph]]
//   neural_memory_run_cuda --device
//
// case_file.h describes CASE; q, k and v may be F32, F16 or BF16. OUT receives float32: each call's y and, after an
// update, its stats and with --initial-weights that output. The final state comes last. Stdout has a line of JSON with
// the device and the placement of the last call.
//
// --time repeats all calls with the state carried on, and stdout has the nanoseconds of each repeat. --graph replays
// them as one CUDA graph. --misaligned puts the state 4 bytes past the start of its memory. --keep-going puts the
// kernel's error into the JSON instead of ending the program on invalid values. --device only prints the device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

#include "plugins/kernels/cuda_status.h"
#include "plugins/kernels/neural_memory_cuda.h"
#include "plugins/tools/case_file.h"
#include "plugins/tools/device_memory.h"

namespace {

using nlohmann::json;
using namespace titans::kernels;

struct Options {
  std::string input, output;
  std::size_t repeats = 0;
  bool two_buffers = false, misaligned = false, graph = false, keep_going = false, initial_weights = false;
};

Options parse_options(int argc, char** argv) {
  Options options;
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--time") {
      if (i + 1 == argc) throw_error(failure("run", "E0103", "missing value of --time", "give one"));
      options.repeats = std::stoul(argv[++i]);
    } else if (word == "--two-buffers") {
      options.two_buffers = true;
    } else if (word == "--misaligned") {
      options.misaligned = true;
    } else if (word == "--initial-weights") {
      options.initial_weights = true;
    } else if (word == "--keep-going") {
      options.keep_going = true;
    } else if (word == "--graph") {
      options.graph = true;
    } else {
      positional.push_back(word);
    }
  }
  if (positional.size() != 2) throw_error(failure("run", "E0103", "missing argument CASE or OUT", "give two files"));
  options.input = positional[0];
  options.output = positional[1];
  return options;
}

std::size_t value_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

json describe(const CudaDevice& device) {
  return {{"sm", device.sm}, {"multiprocessors", device.multiprocessors}, {"shared_bytes", device.shared_bytes}};
}

CudaDevice current_device() {
  CudaDevice device;
  throw_error(CudaDevice::current(device));
  return device;
}

class Runner {
 public:
  explicit Runner(const Options& options) : options_(options), case_(options.input), device_(current_device()) {
    values_ = case_.tensors.at("0.q").dtype;
    std::string error;
    if (case_.op == ChunkConfiguration::kOperator) {
      chunk_ = case_.configuration<ChunkConfiguration>();
      kernel_ = CudaKernel::create(chunk_, values_, device_, error);
    } else {
      const auto configuration = case_.configuration<Configuration>();
      update_ = configuration.mode == Mode::kUpdate;
      kernel_ = CudaKernel::create(configuration, values_, device_, error);
    }
    throw_error(error);
    prepare();
  }

  void run() {
    std::ofstream out(options_.output, std::ios::binary);
    std::int32_t status = 0;
    for (Operands& call : calls_) {
      enqueue(call);
      synchronize();
      status_->download(&status);
      if (status != 0 && !options_.keep_going) throw_error(status_message(status));
      write(out, call[kY]);
      if (update_) write(out, call[kStats]);
      if (call[kInitialWeights].present()) write(out, call[kInitialWeights]);
    }
    write(out, state_);
    if (!out.flush()) {
      throw_error(failure("run", "E1001", "a file cannot be written: " + options_.output, "check the disk"));
    }
    const Tensor& q = calls_.back()[kQ];
    json report{{"device", describe(device_)}, {"placement", kernel_->placement(q.shape[0], q.shape[1], q.shape[2])}};
    if (status != 0) report["status"] = status_message(status);
    if (options_.repeats > 0) {
      const auto all = [&] {
        for (Operands& call : calls_) enqueue(call);
      };
      report["ns"] = time_on_device(all, options_.repeats, options_.graph);
    }
    std::cout << report.dump() << "\n";
  }

 private:
  // Copies the tensor to device memory, `before` bytes past the start of its buffer.
  void device_copy(Tensor& tensor, std::size_t bytes, std::size_t before = 0) {
    buffers_.push_back(std::make_unique<DeviceBuffer>(before + bytes));
    if (tensor.data != nullptr) {
      std::vector<std::byte> host(before + bytes);
      std::memcpy(host.data() + before, tensor.data, bytes);
      buffers_.back()->upload(host.data());
    }
    tensor.data = static_cast<std::byte*>(buffers_.back()->data()) + before;
  }

  void prepare() {
    const std::size_t state_bytes = case_.memory.at("state").bytes();
    state_ = next_ = case_.tensors.at("state");
    const std::size_t before = options_.misaligned ? sizeof(float) : 0;
    device_copy(state_, state_bytes, before);
    next_.data = state_.data;
    if (options_.two_buffers) {
      next_.data = nullptr;
      device_copy(next_, state_bytes, before);
    }
    std::size_t workspace = 0;
    for (std::size_t call = 0; call < case_.calls; ++call) {
      Operands operands = case_.inputs(call);
      for (std::size_t i = kQ; i < kInputs; ++i) {
        if (!operands[i].present()) continue;
        device_copy(operands[i], case_.memory.at(std::to_string(call) + "." + kOperandNames[i]).bytes());
      }
      const Tensor& q = operands[kQ];
      operands[kY] = q;
      operands[kY].data = nullptr;
      device_copy(operands[kY], static_cast<std::size_t>(q.elements()) * value_bytes(values_));
      if (update_) {
        operands[kStats] = float_tensor(nullptr, {q.shape[0], q.shape[1], kStatCount});
        device_copy(operands[kStats], static_cast<std::size_t>(operands[kStats].elements()) * sizeof(float));
      }
      if (options_.initial_weights) {
        operands[kInitialWeights] =
            float_tensor(nullptr, {q.shape[0], q.shape[1], chunk_.chunks(q.shape[2]), chunk_.all_elements()});
        device_copy(operands[kInitialWeights],
                    static_cast<std::size_t>(operands[kInitialWeights].elements()) * sizeof(float));
      }
      workspace = std::max(workspace, kernel_->workspace_bytes(q.shape[0], q.shape[1], q.shape[2]));
      calls_.push_back(operands);
    }
    workspace_ = std::make_unique<DeviceBuffer>(workspace);
    status_ = std::make_unique<DeviceBuffer>(sizeof(std::int32_t));
    const std::int32_t good = 0;
    status_->upload(&good);
  }

  void enqueue(Operands& operands) {
    operands[kState] = state_;
    if (update_) operands[kStateOut] = next_;
    const std::string error =
        kernel_->run(operands, workspace_->data(), static_cast<std::int32_t*>(status_->data()), work_stream());
    throw_error(error);
    if (update_) std::swap(state_, next_);
  }

  // Converts to float32.
  void write(std::ofstream& out, const Tensor& tensor) const {
    const auto count = static_cast<std::size_t>(tensor.elements());
    for (const auto& buffer : buffers_) {
      const std::byte* begin = static_cast<std::byte*>(buffer->data());
      if (tensor.as<std::byte>() < begin || tensor.as<std::byte>() >= begin + buffer->bytes()) continue;
      std::vector<std::byte> raw(buffer->bytes());
      buffer->download(raw.data());
      const std::byte* values_at = raw.data() + (tensor.as<std::byte>() - begin);
      std::vector<float> values(count);
      for (std::size_t i = 0; i < count; ++i) values[i] = to_float(values_at, tensor.dtype, i);
      out.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(count * sizeof(float)));
      return;
    }
  }

  static float to_float(const std::byte* raw, DType dtype, std::size_t i) {
    const std::byte* at = raw + i * value_bytes(dtype);
    if (dtype == DType::kFloat16) return __half2float(*reinterpret_cast<const __half*>(at));
    if (dtype == DType::kBFloat16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
    return *reinterpret_cast<const float*>(at);
  }

  Options options_;
  CaseFile case_;
  CudaDevice device_;
  ChunkConfiguration chunk_;  // of ChunkNeuralMemory
  DType values_ = DType::kFloat32;
  bool update_ = true;
  std::unique_ptr<CudaKernel> kernel_;
  Tensor state_, next_;
  std::vector<Operands> calls_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::unique_ptr<DeviceBuffer> workspace_, status_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 2 && std::string(argv[1]) == "--device") {
      std::cout << describe(current_device()).dump() << "\n";
      return 0;
    }
    Runner(parse_options(argc, argv)).run();
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
