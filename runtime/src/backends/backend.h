// What a backend is to the core. A backend lives in a shared library of its own, libtitans_backend_NAME.so, and exports
// the function titans_backend_entry. It knows graphs and buffers, no streams and no schedule; the core knows streams
// and schedule, no device. Everything here throws Error; that one library catches what another threw rests on both
// being built with the same C++ standard library, whose types are told apart by name.
//
// Buffers and workspaces belong to the engine that made them and are destroyed before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "bundle/bundle.h"

namespace titans::core {

// Core and backend are built together; a change of any class in this header or in one that it includes raises this.
inline constexpr std::uint32_t kBackendAbi = 8;

// The same bytes of each row of a tensor: in each of `rows` rows, which start `pitch` bytes apart, `bytes` from
// `offset` on.
struct Stripe {
  std::size_t offset;
  std::size_t bytes;
  std::size_t pitch;
  std::size_t rows;
};

// One state tensor in the memory of the device.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void upload(const std::byte* host) = 0;
  virtual void download(std::byte* host) const = 0;
  virtual void copy_from(const Buffer& other) = 0;
  // The stripe alone, from where it lies in `other` to the same place here.
  virtual void copy_stripe_from(const Buffer& other, const Stripe& stripe) = 0;
  // Where the host can read it without a copy, as it is between calls; NULL elsewhere.
  virtual const std::byte* host() const { return nullptr; }
};

// What one call needs beside state: the inputs' and the output's buffers. Reused from call to call, never by two at
// once.
class Workspace {
 public:
  virtual ~Workspace() = default;
  // Rows of the last call's output, logits or vectors, in host memory, row t after its token t; valid until the next
  // call. A device copies here, and only what is asked for.
  virtual const float* output(std::size_t first_row, std::size_t rows) = 0;
};

struct Call {
  std::size_t graph;           // index into the manifest's graphs, of one that Bundle::graphs has
  const std::int32_t* tokens;  // as many as the graph consumes; NULL where the bundle takes vectors
  const float* vectors;        // the same of vectors, one after the other; NULL where it takes tokens
  std::int64_t position;
  bool learn;
  const Buffer* const* state;  // one for each of the manifest's state
  Buffer* const* next_state;   // the same buffers where the engine works in place, others elsewhere
};

class Executor {
 public:
  virtual ~Executor() = default;
  virtual std::string version() const = 0;  // of the vendor's library
  // What computes the memory: our kernel, as "cpu-avx512", or "standard-operators", which is the graphs' own.
  virtual std::string memory_kernel() const = 0;
  // What else users may want to know, for the session's info.
  virtual std::map<std::string, std::string> details() const { return {}; }
  // Whether one buffer serves as input and output of that state tensor in every graph.
  virtual bool in_place(std::size_t state) const = 0;
  virtual std::unique_ptr<Buffer> allocate(std::size_t state) = 0;
  virtual std::unique_ptr<Workspace> make_workspace() = 0;
  // Returns when the results are there. From several threads at once with different workspaces.
  virtual void run(const Call& call, Workspace& workspace) = 0;
};

// Whether our kernel computes the memory: where it is installed, always, never.
enum class KernelChoice : std::uint8_t { kAuto, kRequire, kOff };

struct ExecutorOptions {
  std::string device;
  std::string library;  // path of the vendor's library, empty: search
  int threads;          // 0: the backend's default
  KernelChoice memory_kernel;
};

// What a backend finds of its vendor's library on this machine.
struct LibraryInfo {
  std::string version;         // "10.3.0", empty: not known
  std::string why_not;         // why it cannot be used, empty: it can
  std::string plugin_version;  // of our plugin for that library, empty: not known
  std::string plugin_why_not;  // why our plugin cannot be used, empty: it can
};

struct BackendEntry {
  std::uint32_t abi;
  // Opens Bundle::graphs: an engine's files where Bundle::engine says so. The bundle outlives the engine.
  std::unique_ptr<Executor> (*open)(const Bundle& bundle, const ExecutorOptions& options);
  // Asked before an engine is chosen, with the vendor's library as in ExecutorOptions. Throws nothing for what is
  // missing. May be NULL: then only opening tells.
  LibraryInfo (*find_library)(const std::string& library) = nullptr;
};

inline constexpr const char* kBackendEntrySymbol = "titans_backend_entry";
using BackendEntryFunction = const BackendEntry* (*)();

}  // namespace titans::core
