package cloudevent

const upperHex = "0123456789ABCDEF"

// AppendEncoded appends s to dst, percent-encoded as the CloudEvents HTTP protocol binding 1.0 §3.1.3.2 wants header values to be:
// space, double quote, percent and every byte outside U+0021 to U+007E becomes %XX, upper case.
func AppendEncoded[T ~string | ~[]byte](dst []byte, s T) []byte {
	start := 0
	for i := range len(s) {
		if c := s[i]; c > ' ' && c < 0x7f && c != '"' && c != '%' {
			continue
		}
		dst = append(dst, s[start:i]...)
		dst = append(dst, '%', upperHex[s[i]>>4], upperHex[s[i]&0xf])
		start = i + 1
	}
	return append(dst, s[start:]...)
}

// AppendDecoded appends s to dst and turns every %XX into its byte, with upper or lower case digits. A percent sign without two
// digits behind it stays, as the binding wants it. It undoes [AppendEncoded].
func AppendDecoded[T ~string | ~[]byte](dst []byte, s T) []byte {
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			hi, ok1 := unhex(s[i+1])
			lo, ok2 := unhex(s[i+2])
			if ok1 && ok2 {
				dst = append(dst, hi<<4|lo)
				i += 2
				continue
			}
		}
		dst = append(dst, s[i])
	}
	return dst
}

// appendValue appends a header value of the producer: only what HTTP or NATS could not carry is encoded.
func appendValue[T ~string | ~[]byte](dst []byte, s T) []byte {
	start := 0
	for i := range len(s) {
		c := s[i]
		if c > ' ' && c < 0x7f || c == ' ' && i > 0 && i < len(s)-1 {
			continue
		}
		dst = append(dst, s[start:i]...)
		dst = append(dst, '%', upperHex[c>>4], upperHex[c&0xf])
		start = i + 1
	}
	return append(dst, s[start:]...)
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
