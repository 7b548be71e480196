package bridge

// idSet is a set of row ids. Ids of one table are close together, so that millions of them take little memory.
type idSet map[int64]*[1 << (chunkBits - 6)]uint64

const chunkBits = 16

func (s idSet) add(id int64) {
	chunk := s[id>>chunkBits]
	if chunk == nil {
		chunk = new([1 << (chunkBits - 6)]uint64)
		s[id>>chunkBits] = chunk
	}
	bit := id & (1<<chunkBits - 1)
	chunk[bit>>6] |= 1 << (bit & 63)
}

func (s idSet) has(id int64) bool {
	chunk := s[id>>chunkBits]
	bit := id & (1<<chunkBits - 1)
	return chunk != nil && chunk[bit>>6]&(1<<(bit&63)) != 0
}
