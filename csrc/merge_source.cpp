#include "merge_source.h"

#include "refuse.h"
#include "row_map.h"

namespace tokenflex {

template <class Index>
void fill_merge_source(const Index* vision_rows, int64_t num_vision, int32_t* source,
                       int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) source[row] = int32_t(row);
  for (int64_t v = 0; v < num_vision; ++v) {
    const int64_t row = vision_rows[v];
    if (row < 0 || row >= rows) {
      refuse("vision_rows[", v, "] must be a row of inputs_embeds, in [0, ", rows, "), got ", row);
    }
    if (is_vision(source[row])) {
      refuse("vision_rows must hold no row twice, but vision_rows[", vision_row(source[row]),
             "] and vision_rows[", v, "] are both ", row);
    }
    source[row] = vision_entry(int32_t(v));
  }
}

template void fill_merge_source(const int32_t*, int64_t, int32_t*, int64_t);
template void fill_merge_source(const int64_t*, int64_t, int32_t*, int64_t);

}  // namespace tokenflex
