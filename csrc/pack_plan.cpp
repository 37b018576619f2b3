// The host planner. Time and memory O(tokens + rows); a handful of microseconds for a batch, so it is
// single-threaded. The checks run one after another rather than in one clever loop: each reads the
// tokens once, from cache, and says one thing. `tokenflex_kernels/packing/reference.py` has the same checks in the same
// order and words.
#include "pack_plan.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "refuse.h"
#include "row_map.h"

namespace tokenflex {
namespace {

// Rows, vision rows and token ids are int32 on the device.
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

void check_counts(const PlanInput& in) {
  // A compact placeholder with no tokens just vanishes. An expanded image of none would appear nowhere,
  // so nothing could tell which sample it belongs to.
  const int64_t least = in.expanded ? 1 : 0;
  int64_t sum = 0;
  for (int64_t image = 0; image < in.num_images; ++image) {
    const int64_t count = in.counts[image];
    if (count < least) {
      refuse("token_counts[", image, "] must be at least ", least,
             in.expanded ? " when expanded=True" : "", ", got ", count);
    }
    // Checked one by one: neither operand passes 2^31, so the int64 sum cannot wrap.
    if (count > kMaxInt32 || (sum += count) > kMaxInt32) {
      refuse("token_counts must add up to at most ", kMaxInt32, " rows, but token_counts[", image,
             "] = ", count, " goes beyond");
    }
  }
}

// How many vision rows there are. No sum of int32 counts over images in memory can pass int64.
int64_t check_images(const PlanInput& in) {
  int64_t rows = 0;
  for (int64_t shown = 0; shown < in.num_shown; ++shown) {
    const int64_t image = in.image(shown);
    if (image < 0 || image >= in.num_images) {
      refuse("image_index[", shown, "] must be an image of token_counts, in [0, ", in.num_images,
             "), got ", image);
    }
    rows += in.counts[image];
  }
  return rows;
}

struct TokenScan {
  int64_t placeholders = 0;
  int64_t max_token_id = -1;
};

TokenScan check_tokens(const PlanInput& in) {
  TokenScan scan;
  for (int64_t sample = 0; sample < in.num_samples; ++sample) {
    for (int64_t at = in.offsets[sample]; at < in.offsets[sample + 1]; ++at) {
      const int64_t token = in.ids[at];
      if (token == in.image_token_id) {
        ++scan.placeholders;
        continue;
      }
      if (token < 0 || token > kMaxInt32) {
        refuse("input_ids[", sample, "][", at - in.offsets[sample], "] must be in [0, ", kMaxInt32,
               "] or the image_token_id ", in.image_token_id, ", got ", token);
      }
      scan.max_token_id = std::max(scan.max_token_id, token);
    }
  }
  return scan;
}

// A bit for every id that a token could be; but a small batch of large ids, which would mostly clear
// bits, sorts a copy. Either way the memory is O(tokens).
int64_t count_token_ids(const PlanInput& in, int64_t max_token_id) {
  constexpr int64_t kWordsPerToken = 16;
  const int64_t tokens = in.offsets[in.num_samples];
  const int64_t words = (max_token_id + 1 + 63) / 64;
  if (words <= kWordsPerToken * tokens) {
    std::vector<uint64_t> seen(size_t(words), 0);
    int64_t count = 0;
    for (int64_t at = 0; at < tokens; ++at) {
      const int64_t token = in.ids[at];
      if (token == in.image_token_id) continue;
      uint64_t& word = seen[size_t(token / 64)];
      const uint64_t bit = uint64_t(1) << (token % 64);
      count += (word & bit) == 0;
      word |= bit;
    }
    return count;
  }
  std::vector<int64_t> text;
  text.reserve(size_t(tokens));
  std::copy_if(in.ids, in.ids + tokens, std::back_inserter(text),
               [&](int64_t token) { return token != in.image_token_id; });
  std::sort(text.begin(), text.end());
  return std::unique(text.begin(), text.end()) - text.begin();
}

// The sample that holds placeholder number `wanted`, which is known to exist.
int64_t sample_of_placeholder(const PlanInput& in, int64_t wanted) {
  int64_t sample = 0;
  for (int64_t at = 0;; ++at) {
    while (at >= in.offsets[sample + 1]) ++sample;
    if (in.ids[at] == in.image_token_id && wanted-- == 0) return sample;
  }
}

const char* name_of_counts(const PlanInput& in) {
  return in.image_index ? "image_index" : "token_counts";
}

void check_compact(const PlanInput& in, int64_t placeholders) {
  if (placeholders == in.num_shown) return;
  std::ostringstream first;
  if (placeholders > in.num_shown) {
    first << "; the counts run out in sample " << sample_of_placeholder(in, in.num_shown);
  }
  refuse(name_of_counts(in), " has ", in.num_shown, " counts, but input_ids has ", placeholders,
         " placeholders (token ", in.image_token_id, ")", first.str());
}

// Every run of neighbouring placeholders must hold a whole number of images. A run ends with its
// sample, so no image straddles two samples.
void check_expanded(const PlanInput& in, int64_t placeholders, int64_t vision_rows) {
  const auto refuse_totals = [&](const std::string& where) {
    refuse(name_of_counts(in), " adds up to ", vision_rows, " over ", in.num_shown,
           " images, but input_ids has ", placeholders, " placeholders (token ", in.image_token_id,
           ")", where);
  };
  int64_t shown = 0;
  for (int64_t sample = 0; sample < in.num_samples; ++sample) {
    const int64_t end = in.offsets[sample + 1];
    for (int64_t at = in.offsets[sample]; at < end; ++at) {
      int64_t run = 0;
      for (; at < end && in.ids[at] == in.image_token_id; ++at) ++run;
      while (run > 0) {
        if (shown == in.num_shown) {
          refuse_totals("; the counts run out in sample " + std::to_string(sample));
        }
        const int64_t image = in.image(shown++);
        if (run < in.counts[image]) {
          refuse("token_counts[", image, "] = ", in.counts[image], ", but input_ids[", sample,
                 "] has a run of placeholders that leaves ", run, " for image ", image);
        }
        run -= in.counts[image];
      }
    }
  }
  if (shown < in.num_shown) refuse_totals("");
}

// The vision rows of an image.
struct Image {
  int64_t first_token = 0;
  int64_t first_row = 0;  // in vision_rows
  int64_t times = 0;      // shown in the batch
  int64_t seen = 0;       // shown so far
};

std::vector<Image> find_images(const PlanInput& in) {
  std::vector<Image> images(size_t(in.num_images));
  for (int64_t shown = 0; shown < in.num_shown; ++shown) ++images[size_t(in.image(shown))].times;
  int64_t token = 0, row = 0;
  for (int64_t image = 0; image < in.num_images; ++image) {
    images[size_t(image)].first_token = token;
    images[size_t(image)].first_row = row;
    token += in.counts[image];
    row += in.counts[image] * images[size_t(image)].times;
  }
  return images;
}

}  // namespace

PlanTotals check_and_count(const PlanInput& in) {
  check_counts(in);
  const int64_t vision_rows = check_images(in);
  const TokenScan scan = check_tokens(in);
  if (in.expanded) {
    check_expanded(in, scan.placeholders, vision_rows);
  } else {
    check_compact(in, scan.placeholders);
  }
  const int64_t text_rows = in.offsets[in.num_samples] - scan.placeholders;
  if (text_rows > kMaxInt32 - vision_rows) {
    refuse("input_ids and token_counts make ", text_rows, " text and ", vision_rows,
           " vision rows, but at most ", kMaxInt32, " rows can be packed");
  }
  return {text_rows + vision_rows, vision_rows, scan.max_token_id,
          count_token_ids(in, scan.max_token_id)};
}

void fill_plan(const PlanInput& in, const PlanLabels& given, const PlanBuffers& out) {
  const int64_t* labels = given.labels ? given.labels : in.ids;
  std::vector<Image> images = find_images(in);
  int64_t row = 0, shown = 0;
  int64_t token_of_image = 0;

  out.cu_seqlens[0] = 0;
  for (int64_t sample = 0; sample < in.num_samples; ++sample) {
    const int64_t first_row = row;
    const auto write = [&](int64_t token, int64_t label, int32_t source) {
      out.input_ids[row] = token;
      out.position_ids[row] = row - first_row;
      out.labels[row] = label;
      out.source[row] = source;
      ++row;
    };

    for (int64_t at = in.offsets[sample]; at < in.offsets[sample + 1]; ++at) {
      const int64_t token = in.ids[at];
      if (token != in.image_token_id) {
        write(token, labels[at], int32_t(token));
        continue;
      }
      const int64_t index = in.image(shown), count = in.counts[index];
      Image& image = images[size_t(index)];
      for (int64_t left = in.expanded ? 1 : count; left > 0; --left, ++token_of_image) {
        out.vision_rows[image.first_row + token_of_image * image.times + image.seen] = int32_t(row);
        write(token, given.ignore_index, vision_entry(int32_t(image.first_token + token_of_image)));
      }
      if (token_of_image == count) {
        ++image.seen;
        ++shown;
        token_of_image = 0;
      }
    }

    // Labels are unshifted: a row is predicted by the row before it, and the first row of a sample
    // must not be predicted by the last row of its neighbour.
    if (row > first_row) out.labels[first_row] = given.ignore_index;
    out.cu_seqlens[sample + 1] = int32_t(row);
  }
}

}  // namespace tokenflex
