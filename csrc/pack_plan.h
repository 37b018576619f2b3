// The packing plan: where each row of the packed batch comes from, worked out on the host.
//
// Two passes, so that the caller owns the memory: `check_and_count` refuses every invalid input and
// says how many rows there will be; `fill_plan` writes into buffers of those sizes and cannot fail.
// Both must be given the same input.
#pragma once

#include <cstdint>

namespace tokenflex {

// Samples lie one after another in `ids`; sample s is ids[offsets[s] .. offsets[s + 1]).
// A placeholder is a token equal to `image_token_id`. Compact prompts (`expanded` false) hold one each
// time they show an image, which makes room for counts[image] rows; expanded ones hold counts[image].
struct PlanInput {
  const int64_t* ids;
  const int64_t* offsets;  // [num_samples + 1], offsets[0] = 0
  int64_t num_samples;
  const int64_t* counts;  // [num_images], in the order of the vision tokens
  int64_t num_images;
  const int64_t* image_index;  // [num_shown], images in order of appearance; null: each once, in order
  int64_t num_shown;           // num_images where image_index is null
  int64_t image_token_id;
  bool expanded;

  int64_t image(int64_t shown) const { return image_index ? image_index[shown] : shown; }
};

struct PlanTotals {
  int64_t rows;
  int64_t vision_rows;  // a vision token has one each time that its image is shown
  int64_t max_token_id;   // the largest text token, -1 if there is no text
  int64_t num_token_ids;  // different text tokens
};

struct PlanLabels {
  const int64_t* labels;  // aligned with PlanInput::ids; null: every text token is supervised
  int64_t ignore_index;
};

struct PlanBuffers {
  int64_t* input_ids;     // [rows]
  int64_t* position_ids;  // [rows]
  int64_t* labels;        // [rows]
  int32_t* source;        // [rows], see row_map.h
  int32_t* vision_rows;   // [vision_rows], by vision token, the rows of each ascending
  int32_t* cu_seqlens;    // [num_samples + 1]
};

// Throws std::invalid_argument that names the argument and the two numbers that disagree.
PlanTotals check_and_count(const PlanInput& input);

void fill_plan(const PlanInput& input, const PlanLabels& labels, const PlanBuffers& out);

}  // namespace tokenflex
