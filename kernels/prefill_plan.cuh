// How prefill attention is cut into tiles: what the planning kernel writes and the attention kernel reads.
#pragma once

// A run of one sequence's rows of the dense batch, whose attention is computed together for each KV head. 32 bytes.
struct __align__(16) Tile {
    int row;         // its first row of the dense batch
    int tokens;      // its rows
    int position;    // of its first row in the sequence
    int page_begin;  // kv_indptr of the sequence
    int section;     // the first tile of the same sequence, and how many it has
    int section_tiles;
    int unused[2];
};

// Header of the plan, followed by the tiles. Sequences with more keys come first, and in a sequence the later rows.
struct __align__(16) Plan {
    int num_tiles;
    int taken;  // work items that CTAs took beyond their first; zero between launches
    int unused[6];
};
