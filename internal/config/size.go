package config

import (
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes.
type Size int64

// Units of sizes are powers of 1024.
const (
	KB Size = 1 << 10
	MB Size = 1 << 20
	GB Size = 1 << 30
)

var sizeUnits = []struct {
	suffix string
	size   Size
}{{"GB", GB}, {"MB", MB}, {"KB", KB}, {"", 1}}

// String returns the size as it is written in the file, in the largest unit that divides it.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && s%u.size == 0 {
			return strconv.FormatInt(int64(s/u.size), 10) + u.suffix
		}
	}
	return "0"
}

// parseSize reads "4GB", "512MB", "64KB" or a number of bytes.
func parseSize(text string) (Size, bool) {
	for _, u := range sizeUnits {
		digits, ok := strings.CutSuffix(text, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil || n > math.MaxInt64/uint64(u.size) {
			return 0, false
		}
		return Size(n) * u.size, true
	}
	return 0, false
}
