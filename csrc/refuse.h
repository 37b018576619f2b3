// Refusing what came from the user, in words and numbers: std::invalid_argument becomes a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace tokenflex {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace tokenflex
