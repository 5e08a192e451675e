/* The tables that decode a codebook of lines, for one instruction set with `bytes`, a vector of bytes
   that `bytes_of` fills with 16 of them. */

typedef struct {
  bytes start_low, start_high, slope;
} line_tables;

/* Return the tables; `offset` is added to each start. */
ALWAYS_INLINE line_tables line_tables_of(const lines *of, int offset) {
  uint8_t low[16], high[16];
  for (int h = 0; h < 16; h++) {
    uint16_t start = (uint16_t)(of->start[h] + offset);
    low[h] = (uint8_t)start, high[h] = (uint8_t)(start >> 8);
  }
  line_tables found = {bytes_of(low), bytes_of(high), bytes_of(of->slope)};
  return found;
}
