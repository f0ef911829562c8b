// The interface between the core and a backend.
//
// A backend is a shared library, libtitans_backend_NAME.so, that exports titans_backend_entry. It handles graphs and
// buffers; the core handles streams and the schedule and has no device code. All functions throw Error. Exceptions
// cross the library boundary because core and backends use the same C++ standard library, which matches exception types
// by name.
//
// Buffers and workspaces belong to the executor that made them and are destroyed before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bundle/bundle.h"

namespace titans::core {

// Core and backend are built together. Increase this with every change to a class in this header or in one that it
// includes.
inline constexpr std::uint32_t kBackendAbi = 11;

// A strided part of a tensor: `bytes` bytes from `offset` in each of `rows` rows, which start `pitch` bytes apart.
struct Stripe {
  std::size_t offset;
  std::size_t bytes;
  std::size_t pitch;
  std::size_t rows;
};

// One state tensor in device memory.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void upload(const std::byte* host) = 0;
  virtual void download(std::byte* host) const = 0;
  virtual void copy_from(const Buffer& other) = 0;
  // Copies one stripe from `other` to the same place here.
  virtual void copy_stripe_from(const Buffer& other, const Stripe& stripe) = 0;
  // The content as the host can read it between calls, or NULL if it is not in host memory.
  virtual const std::byte* host() const { return nullptr; }
  // True if the buffer is a slot of a pool, so that calls of several streams can use it.
  virtual bool in_pool() const { return false; }
};

// The input and output buffers of one call. Reused by later calls, never by two at once.
class Workspace {
 public:
  virtual ~Workspace() = default;
  // Rows of the last call's output (logits or vectors) in host memory, valid until the next call. Row t belongs to
  // token t. With several streams and T tokens each, row b T + t belongs to token t of stream b. A device copies only
  // the requested rows.
  virtual const float* output(std::size_t first_row, std::size_t rows) = 0;
};

// One stream's part of a graph call.
struct Call {
  std::size_t graph;           // index in the manifest's graphs; must be listed in Bundle::graphs
  const std::int32_t* tokens;  // one per token of the graph; NULL if the bundle takes vectors
  const float* vectors;        // contiguous; NULL if the bundle takes tokens
  std::int64_t position;
  bool learn;
  const Buffer* const* state;  // one per state tensor of the manifest
  Buffer* const* next_state;   // the same buffer for a tensor updated in place, another one otherwise
};

class Executor {
 public:
  virtual ~Executor() = default;
  virtual std::string version() const = 0;  // version of the vendor library
  // The kernel that computes the memory, such as "cpu-avx512", or "standard-operators" if the graphs do it themselves.
  virtual std::string memory_kernel() const = 0;
  // More details for the session's info.
  virtual std::map<std::string, std::string> details() const { return {}; }
  // True if every graph may use one buffer as input and output of that state tensor.
  virtual bool in_place(std::size_t state) const = 0;
  virtual std::unique_ptr<Buffer> allocate(std::size_t state) = 0;
  // The buffers of one stream's current state, one per state tensor. An executor with pools returns slots of them, the
  // same in each pool, as long as it has any.
  virtual std::vector<std::unique_ptr<Buffer>> allocate_current(std::size_t states) {
    std::vector<std::unique_ptr<Buffer>> buffers;
    for (std::size_t state = 0; state < states; ++state) buffers.push_back(allocate(state));
    return buffers;
  }
  virtual std::unique_ptr<Workspace> make_workspace() = 0;
  // Returns after the results are complete. Threads may call it concurrently with different workspaces.
  virtual void run(const Call& call, Workspace& workspace) = 0;

  // The most streams that one graph call may take.
  virtual std::size_t most_streams() const { return 1; }
  // Runs `count` calls of one graph, 1 to most_streams(), as one. Their state lies in pools, each in its own slots. If
  // it throws, the state of any of them may have changed. Only called if most_streams() is above 1.
  virtual void run_together(const Call* calls, std::size_t count, Workspace& workspace);
};

inline void Executor::run_together(const Call* /*calls*/, std::size_t /*count*/, Workspace& /*workspace*/) {
  throw std::logic_error("this executor takes one stream a call");
}

// Use our memory kernel: if installed, always, or never.
enum class KernelChoice : std::uint8_t { kAuto, kRequire, kOff };

struct ExecutorOptions {
  std::string device;
  std::string library;  // path of the vendor library; empty: search
  int threads;          // 0: the backend's default
  KernelChoice memory_kernel;
  bool any_operator = false;  // accept graphs with operators that this project does not write
};

// The vendor library that a backend finds on this machine.
struct LibraryInfo {
  std::string version;         // "10.3.0"; empty: unknown
  std::string why_not;         // why the library is unusable; empty: usable
  std::string plugin_version;  // version of our plugin for the library; empty: unknown
  std::string plugin_why_not;  // why the plugin is unusable; empty: usable
};

struct BackendEntry {
  std::uint32_t abi;
  // Opens Bundle::graphs, which are an engine's files if Bundle::engine is set. The bundle must outlive the executor.
  std::unique_ptr<Executor> (*open)(const Bundle& bundle, const ExecutorOptions& options);
  // Called before an engine is chosen, with the path of ExecutorOptions. Does not throw for missing libraries. May be
  // NULL; then only opening reveals problems.
  LibraryInfo (*find_library)(const std::string& library) = nullptr;
};

inline constexpr const char* kBackendEntrySymbol = "titans_backend_entry";
using BackendEntryFunction = const BackendEntry* (*)();

}  // namespace titans::core
