// A bundle opened for use: manifest read, files checked, tensors mapped.
#pragma once

#include <filesystem>
#include <list>

#include "manifest.h"
#include "mapped_file.h"
#include "safetensors.h"

namespace titans::core {

class Bundle {
 public:
  explicit Bundle(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }
  const Manifest& manifest() const { return manifest_; }
  // Every graph's `weights` are in here.
  const Tensors& weights() const { return weights_; }
  // One tensor for each of the manifest's state, of its shape and type.
  const Tensors& initial_state() const { return initial_state_; }

 private:
  // Maps a file after checking its size and hash against the manifest.
  const MappedFile& open_checked(const std::string& name);
  void check_weights() const;
  void check_initial_state() const;

  std::filesystem::path folder_;
  Manifest manifest_;
  std::list<MappedFile> mapped_;  // what the tensors point into
  Tensors weights_;
  Tensors initial_state_;
};

}  // namespace titans::core
