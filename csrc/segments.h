// Rows that are to be summed into one: the one place that knows which they are, and in which order.
//
// A segment is a run of positions with the same slot in a sorted list. Floating-point sums depend on
// their order, so it is fixed by the list alone: whatever threads or blocks share the work, and on the
// host as on the device, the bits are the same.
//
//   1. The list is cut into tiles of kTile positions, which cuts segments into pieces. The rows of a
//      piece are added one after another.
//   2. A segment of one piece is done. Of a longer one, the pieces after the first are dealt to kLanes
//      lanes in turn, each lane adds up its pieces, and the first piece and the lanes are added in order.
//
// No sum has more than kTile rows or 1 / (kTile kLanes) of a segment's to add one after another, so that
// one token which makes up a whole batch is still the work of many threads.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "row_map.h"

namespace tokenflex {

constexpr int64_t kTile = 32;
constexpr int kLanes = 8;

enum class Piece {
  kWhole,  // a segment of this one piece
  kFirst,  // the first of a longer segment: summed when the others are known
  kOther,  // a further piece of a segment; there is at most one in a tile, at its beginning
};

struct Segments {
  const int32_t* slots;  // [num], ascending: the row of the result, the same throughout a segment
  const int64_t* rows;   // [num], the row to be added
  int64_t num;

  TOKENFLEX_HOST_DEVICE int64_t tiles() const { return (num + kTile - 1) / kTile; }
  TOKENFLEX_HOST_DEVICE int64_t tile_begin(int64_t tile) const { return tile * kTile; }
  TOKENFLEX_HOST_DEVICE int64_t tile_end(int64_t tile) const {
    return tile + 1 < tiles() ? (tile + 1) * kTile : num;
  }

  // Whether a segment has both position `at - 1` and position `at`.
  TOKENFLEX_HOST_DEVICE bool continues(int64_t at) const {
    return at > 0 && at < num && slots[at - 1] == slots[at];
  }

  // Whether a piece of the tile that ends at `tile_end` ends before position `at`.
  TOKENFLEX_HOST_DEVICE bool piece_ends(int64_t at, int64_t tile_end) const {
    return at == tile_end || !continues(at);
  }

  // What the piece [begin, end) of a tile is to its segment.
  TOKENFLEX_HOST_DEVICE Piece piece(int64_t begin, int64_t end) const {
    if (continues(begin)) return Piece::kOther;
    return continues(end) ? Piece::kFirst : Piece::kWhole;
  }

  // Where the segment begins that begins in `tile` and goes on after it; -1 if there is none.
  TOKENFLEX_HOST_DEVICE int64_t outgoing(int64_t tile) const {
    const int64_t end = tile_end(tile);
    if (!continues(end)) return -1;
    int64_t at = end - 1;
    while (at > tile_begin(tile) && continues(at)) --at;
    return continues(at) ? -1 : at;
  }

  // The tile whose piece lane `lane` adds in its turn `turn`, of a segment that goes on after `tile`.
  TOKENFLEX_HOST_DEVICE static int64_t dealt(int64_t tile, int64_t lane, int64_t turn) {
    return tile + 1 + lane + turn * kLanes;
  }

  // Whether `tile` begins with a piece of the segment of `slot`, which began in a tile before it.
  TOKENFLEX_HOST_DEVICE bool reaches(int64_t tile, int32_t slot) const {
    return tile < tiles() && slots[tile_begin(tile)] == slot;
  }
};

// A sum of rows: sums[slot] = the sum of grad[rows] over a segment, in the type of `grad`.
struct RowSums {
  Segments segments;
  ConstRows grad;  // [.., width]
  Rows sums;       // [.., width]; rows that are no slot are left alone
  Rows partials;   // [tiles, width] of the type sums are made in: the pieces kOther, by tile
  int64_t width;   // elements of a row
};

}  // namespace tokenflex
