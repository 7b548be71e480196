package decode

import "bytes"

// validJSON reports whether text is one JSON value, as json.Valid does, but however deep it is: Postgres takes what its stack has room for, which
// by default is more than the 10,000 levels of encoding/json, and such a row must not end the bridge. Stack is scratch, and is returned for the next call.
func validJSON(text, stack []byte) (valid bool, _ []byte) {
	stack = stack[:0] // the brackets that are to come
	i := skipSpace(text, 0)
	for {
		if i == len(text) {
			return false, stack
		}
		// A value begins here.
		switch c := text[i]; c {
		case '{', '[':
			end := c + 2 // '}' and ']'
			i = skipSpace(text, i+1)
			if i < len(text) && text[i] == end {
				i++
				break
			}
			stack = append(stack, end)
			if c == '{' {
				if i = skipKey(text, i); i < 0 {
					return false, stack
				}
			}
			continue
		case '"':
			if i = skipString(text, i); i < 0 {
				return false, stack
			}
		default:
			if i = skipWord(text, i); i < 0 {
				return false, stack
			}
		}
		// A value has ended here, and maybe what it is part of.
		for {
			i = skipSpace(text, i)
			if len(stack) == 0 {
				return i == len(text), stack
			}
			end := stack[len(stack)-1]
			if i < len(text) && text[i] == end {
				stack = stack[:len(stack)-1]
				i++
				continue
			}
			if i == len(text) || text[i] != ',' {
				return false, stack
			}
			i = skipSpace(text, i+1)
			if end == '}' {
				if i = skipKey(text, i); i < 0 {
					return false, stack
				}
			}
			break
		}
	}
}

func skipSpace(text []byte, i int) int {
	for i < len(text) && (text[i] == ' ' || text[i] == '\t' || text[i] == '\r' || text[i] == '\n') {
		i++
	}
	return i
}

// skipKey returns where the value of the name at i begins, or -1.
func skipKey(text []byte, i int) int {
	if i = skipString(text, i); i < 0 {
		return -1
	}
	if i = skipSpace(text, i); i == len(text) || text[i] != ':' {
		return -1
	}
	return skipSpace(text, i+1)
}

// skipString returns the end of the string at i, or -1.
func skipString(text []byte, i int) int {
	if i == len(text) || text[i] != '"' {
		return -1
	}
	for i++; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			return i + 1
		case c < ' ':
			return -1
		case c == '\\':
			if i++; i == len(text) {
				return -1
			}
			if text[i] == 'u' {
				for range 4 {
					if i++; i == len(text) || !isHex(text[i]) {
						return -1
					}
				}
			} else if bytes.IndexByte([]byte(`"\/bfnrt`), text[i]) < 0 {
				return -1
			}
		}
	}
	return -1
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// skipWord returns the end of the number, true, false or null at i, or -1.
func skipWord(text []byte, i int) int {
	end := i
	for end < len(text) && (text[end] == '+' || text[end] == '-' || text[end] == '.' || '0' <= text[end] && text[end] <= '9' ||
		'a' <= text[end] && text[end] <= 'z' || text[end] == 'E') {
		end++
	}
	switch word := text[i:end]; string(word) {
	case "true", "false", "null":
		return end
	default:
		if isNumber(word) {
			return end
		}
		return -1
	}
}
