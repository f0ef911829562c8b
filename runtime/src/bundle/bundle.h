// An open bundle: manifest read, files checked, tensors mapped.
#pragma once

#include <filesystem>
#include <functional>
#include <list>
#include <vector>

#include "base/mapped_file.h"
#include "base/safetensors.h"
#include "bundle/manifest.h"
#include "bundle/schedule.h"

namespace titans::core {

// Chooses an engine of the manifest; NULL selects the plain graphs. Called after the manifest is read and before any
// other file is opened.
using EngineChooser = std::function<const EngineRecord*(const Manifest&)>;

class Bundle {
 public:
  // Opens the plain graphs without a chooser. expect_sha256: of the bundle, in hexadecimal digits; empty: any.
  explicit Bundle(const std::filesystem::path& folder, const EngineChooser& choose = {},
                  std::string_view expect_sha256 = {});
  // engine_ points into manifest_.
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;

  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  // NULL: the plain graphs.
  const EngineRecord* engine() const { return engine_; }
  // The runnable graphs and their files: the engine's, or all of the manifest's.
  const std::vector<EngineGraph>& graphs() const { return graphs_; }
  // The schedule of graphs(), with the same indices.
  const Schedule& schedule() const { return schedule_; }
  // Contains the `weights` of all graphs(): the bundle's and those in the engine's own file. Empty if the engine files
  // contain all weights.
  const Tensors& weights() const { return weights_; }
  // Gives the pages of the mapped tensors back. Later reads map them again.
  void release_pages() const {
    for (const MappedFile& file : mapped_) file.release();
  }
  // One tensor per state tensor of the manifest, with its shape and dtype.
  const Tensors& initial_state() const { return initial_state_; }

 private:
  // Maps a file after checking its size and hash against the manifest.
  const MappedFile& open_checked(const std::string& name);
  bool needs_weights() const;
  // Adds the weights of the engine's own file, if it has one.
  void read_engine_weights();
  void check_weights() const;
  void check_initial_state() const;

  std::filesystem::path folder_;
  Manifest manifest_;
  const EngineRecord* engine_;
  std::vector<EngineGraph> graphs_;
  Schedule schedule_;
  std::list<MappedFile> mapped_;  // backs the tensors
  Tensors weights_;
  Tensors initial_state_;
};

}  // namespace titans::core
