package config

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"ebb/internal/redact"
)

// decoder carries the values of a file into a Config. It checks the shape of the file and the type of each value; what the values
// say is checked by Config.check.
type decoder struct {
	file   string
	getenv func(string) (string, bool)
	// origins holds every key that the file writes.
	origins map[string]origin
}

// origin is where a key stands in the file.
type origin struct {
	line int
	// written is the value as the file has it, when variables were put into it: errors show the names, not what they hold.
	written string
}

// entry is a key that may be written: a value, or a section of further entries.
type entry struct {
	name string
	read func(key string, n ast.Node) error
	sub  []entry
}

func (d *decoder) decode(data []byte, c *Config) error {
	root, err := d.parse(data)
	if err != nil || root == nil {
		return err
	}
	return d.mapping("", root, d.entries(c))
}

// entries is the file as it may be written, in the order of the documentation.
func (d *decoder) entries(c *Config) []entry {
	return []entry{
		{name: "postgres", read: d.text(&c.Postgres)},
		{name: "slot", read: d.text(&c.Slot)},
		{name: "publication", read: d.text(&c.Publication)},
		{name: "source", read: d.text(&c.Source)},
		{name: "listen", read: d.text(&c.Listen)},
		{name: "buffers", read: d.buffers(&c.Buffers), sub: d.bufferEntries(&Buffer{})},
		{name: "sink", read: d.text(&c.Sink)},
		{name: "nats", sub: []entry{
			{name: "stream", read: d.text(&c.NATS.Stream)},
			{name: "subject", read: d.text(&c.NATS.Subject)},
			{name: "format", read: d.text(&c.NATS.Format)},
			{name: "create_stream", read: d.boolean(&c.NATS.CreateStream)},
			{name: "replicas", read: d.number(&c.NATS.Replicas)},
			{name: "exclusive", read: d.boolean(&c.NATS.Exclusive)},
			{name: "creds", read: d.text(&c.NATS.Creds)},
			{name: "on_reject", read: d.text(&c.NATS.OnReject)},
			{name: "tls", sub: []entry{
				{name: "ca", read: d.text(&c.NATS.TLS.CA)},
				{name: "cert", read: d.text(&c.NATS.TLS.Cert)},
				{name: "key", read: d.text(&c.NATS.TLS.Key)},
			}},
		}},
		{name: "embedded", sub: []entry{
			{name: "store", read: d.text(&c.Embedded.Store)},
			{name: "listen", read: d.text(&c.Embedded.Listen)},
			{name: "config", read: d.text(&c.Embedded.Config)},
		}},
		{name: "http", sub: []entry{
			{name: "format", read: d.text(&c.HTTP.Format)},
			{name: "secrets", read: d.texts(&c.HTTP.Secrets)},
			{name: "headers", read: d.headers(&c.HTTP.Headers)},
			{name: "bearer_file", read: d.text(&c.HTTP.BearerFile)},
			{name: "timeout", read: d.duration(&c.HTTP.Timeout)},
			{name: "concurrency", read: d.number(&c.HTTP.Concurrency)},
			{name: "batch", read: d.number(&c.HTTP.Batch)},
			{name: "window", read: d.number(&c.HTTP.Window)},
			{name: "on_reject", read: d.text(&c.HTTP.OnReject)},
			{name: "gzip", read: d.boolean(&c.HTTP.Gzip)},
			{name: "tls", sub: []entry{
				{name: "ca", read: d.text(&c.HTTP.TLS.CA)},
				{name: "cert", read: d.text(&c.HTTP.TLS.Cert)},
				{name: "key", read: d.text(&c.HTTP.TLS.Key)},
			}},
		}},
		{name: "replay", sub: []entry{
			{name: "window", read: d.duration(&c.Replay.Window)},
			{name: "max_wal", read: d.size(&c.Replay.MaxWAL)},
		}},
		{name: "flow", sub: []entry{
			{name: "warn", read: d.size(&c.Flow.Warn)},
			{name: "limit", read: d.size(&c.Flow.Limit)},
			{name: "on_full", read: d.text(&c.Flow.OnFull)},
		}},
		{name: "recorded", sub: []entry{
			{name: "every", read: d.duration(&c.Recorded.Every)},
			{name: "keep", read: d.duration(&c.Recorded.Keep)},
		}},
	}
}

func (d *decoder) bufferEntries(b *Buffer) []entry {
	return []entry{
		{name: "table", read: d.text(&b.Table)},
		{name: "id", read: d.text(&b.ID)},
		{name: "topic", read: d.topic(&b.Topic)},
		{name: "key", read: d.text(&b.Key)},
		{name: "payload", read: d.text(&b.Payload)},
		{name: "content_type", read: d.text(&b.ContentType)},
		{name: "headers", read: d.text(&b.Headers)},
		{name: "delivered", read: d.text(&b.Delivered)},
		{name: "recorded", read: d.text(&b.Recorded)},
		{name: "start", read: d.text(&b.Start)},
	}
}

// parse returns the root of the file's only document, or nil when there is nothing in it.
func (d *decoder) parse(data []byte) (root ast.Node, err error) {
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	// The parser counts some lines twice that end in CR LF.
	data = bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
	data = bytes.ReplaceAll(data, []byte("\r"), []byte("\n"))
	if err := d.characters(data); err != nil {
		return nil, err
	}
	// The parser is another's and the file may be anything: a panic there is a file that cannot be read.
	defer func() {
		if recover() != nil {
			root, err = nil, &Error{File: d.file, Line: 1, Msg: "not YAML: it cannot be parsed; compare it with the documentation's sample"}
		}
	}()
	file, err := parser.ParseBytes(data, 0, parser.AllowDuplicateMapKey())
	if err != nil {
		line, msg := 1, "it cannot be parsed"
		var yamlErr yaml.Error
		if errors.As(err, &yamlErr) {
			msg = strings.ReplaceAll(yamlErr.GetMessage(), "character '\t' that", "a tab, which")
			msg = oneLine(msg)
			if tk := yamlErr.GetToken(); tk != nil && tk.Position != nil {
				line = max(1, tk.Position.Line)
			}
		}
		return nil, &Error{File: d.file, Line: line, Msg: "not YAML: " + msg}
	}
	for _, doc := range file.Docs {
		switch doc.Body.(type) {
		case nil, *ast.DirectiveNode, *ast.CommentGroupNode:
			continue
		}
		if root != nil {
			return nil, &Error{File: d.file, Line: d.line(doc.Body), Msg: "a second document; write the whole configuration in one"}
		}
		root = doc.Body
	}
	return root, nil
}

// characters refuses what YAML does not allow anywhere and the parser lets through.
func (d *decoder) characters(data []byte) error {
	line := 1
	for len(data) > 0 {
		r, n := utf8.DecodeRune(data)
		switch {
		case r == utf8.RuneError && n == 1:
			return &Error{File: d.file, Line: line, Msg: "not YAML: not UTF-8 text; save the file as UTF-8"}
		case r == '\n':
			line++
		case r < ' ' && r != '\t', r == 0x7f:
			return &Error{File: d.file, Line: line, Msg: fmt.Sprintf("not YAML: the control character %U; remove it", r)}
		}
		data = data[n:]
	}
	return nil
}

// mapping reads the keys of n, which is the value of key or, for an empty key, the whole file.
func (d *decoder) mapping(key string, n ast.Node, entries []entry) error {
	return d.eachKey(key, n, func(name string, keyNode, value ast.Node) error {
		full := join(key, name)
		for _, e := range entries {
			switch {
			case e.name != name:
			case e.read != nil:
				return e.read(full, value)
			default:
				return d.mapping(full, value, e.sub)
			}
		}
		return d.fail(keyNode, full, "unknown key; "+d.suggest(full, key, name, entries))
	})
}

// eachKey calls fn for each key of n after it has checked that n is a plain mapping without duplicates.
func (d *decoder) eachKey(key string, n ast.Node, fn func(name string, keyNode, value ast.Node) error) error {
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	case *ast.NullNode:
		if key == "" {
			return nil
		}
		return d.fail(n, key, "no value; write "+want(key)+", or leave the key out")
	default:
		if key == "" {
			return d.fail(n, "", "not a configuration; write keys and values, such as slot: ebb")
		}
		return d.fail(n, key, d.shape(n)+", not a set of keys; write "+want(key))
	}
	seen := map[string]int{}
	for _, v := range values {
		name, err := d.keyName(key, v.Key)
		if err != nil {
			return err
		}
		full, line := join(key, name), d.line(v.Key)
		first, twice := seen[name]
		seen[name] = line
		d.origins[full] = origin{line: line}
		if twice {
			return d.fail(v.Key, full, fmt.Sprintf("written twice, first on line %d; keep one of them", first))
		}
		if err := fn(name, v.Key, v.Value); err != nil {
			return err
		}
	}
	return nil
}

// keyName returns the text of a key.
func (d *decoder) keyName(parent string, n ast.MapKeyNode) (string, error) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.MergeKeyNode, *ast.MappingKeyNode, *ast.AliasNode, *ast.AnchorNode, *ast.TagNode:
		return "", d.fail(n, parent, "a YAML anchor, alias, tag or complex key; write plain keys and values")
	case nil:
		return "", &Error{File: d.file, Line: 1, Key: parent, Msg: "a key without a name; write keys and values, such as slot: ebb"}
	}
	return n.GetToken().Value, nil
}

// suggest says what may have been meant by a key that does not exist.
func (d *decoder) suggest(full, parent, name string, entries []entry) string {
	best, bestDistance := "", len(name)/3+2
	for _, e := range entries {
		if n := distance(name, e.name); n < bestDistance {
			best, bestDistance = join(parent, e.name), n
		}
	}
	if best != "" {
		return "did you mean " + best + "?"
	}
	var c Config
	var elsewhere string
	walk("", d.entries(&c), func(key string) {
		if elsewhere == "" && (strings.HasSuffix(key, "."+name) || strings.HasSuffix(full, "."+key)) {
			elsewhere = key
		}
	})
	if elsewhere != "" {
		return "did you mean " + elsewhere + "?"
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.name)
	}
	return "write one of " + strings.Join(names, ", ")
}

// walk calls fn for the full key of every entry.
func walk(parent string, entries []entry, fn func(key string)) {
	for _, e := range entries {
		key := join(parent, e.name)
		fn(key)
		if e.name == "buffers" {
			key += "[]"
		}
		walk(key, e.sub, fn)
	}
}

// distance is the number of letters to insert, remove or change to make a into b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			next := min(row[j+1]+1, row[j]+1, diagonal+cost)
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// scalar is one value of the file.
type scalar struct {
	node ast.Node
	// text is the value with its variables put in.
	text string
	// shown is the value as errors show it; empty for a secret.
	shown string
	// quoted text is never a number or true or false.
	quoted bool
	// substituted text has variables in it, which may hold any type.
	substituted bool
}

// scalar reads one value and puts its variables in. kind says what it should have been.
func (d *decoder) scalar(key string, n ast.Node, kind string) (scalar, error) {
	s := scalar{node: n}
	switch n := n.(type) {
	case *ast.StringNode:
		s.text = n.Value
		s.quoted = n.Token.Type == token.SingleQuoteType || n.Token.Type == token.DoubleQuoteType
	case *ast.LiteralNode:
		s.text, s.quoted = n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		s.text = n.GetToken().Value
	case *ast.NullNode:
		return s, d.fail(n, key, "no value; write "+want(key))
	default:
		return s, d.fail(n, key, d.shape(n)+", not "+kind+"; write "+want(key))
	}
	written := s.text
	text, err := d.substitute(key, n, written)
	if err != nil {
		return s, err
	}
	_, isText := n.(*ast.StringNode)
	s.substituted = strings.Contains(strings.ReplaceAll(written, "$${", ""), "${")
	s.text = text
	switch {
	case secretKey(key):
	case s.substituted:
		s.shown = "the value of " + quote(redact.URL(written))
	case isText || s.quoted:
		s.shown = quote(written)
	default:
		s.shown = written
	}
	if s.substituted {
		o := d.origins[key]
		o.written = s.shown
		d.origins[key] = o
	}
	return s, nil
}

// substitute puts environment variables in the places of ${NAME}; $${ stands for ${ itself.
func (d *decoder) substitute(key string, n ast.Node, text string) (string, error) {
	var b strings.Builder
	for {
		i := strings.Index(text, "${")
		if i < 0 {
			b.WriteString(text)
			return b.String(), nil
		}
		if i > 0 && text[i-1] == '$' {
			b.WriteString(text[:i-1] + "${")
			text = text[i+2:]
			continue
		}
		b.WriteString(text[:i])
		name, rest, ok := strings.Cut(text[i+2:], "}")
		if !ok || !isVariable(name) {
			return "", d.fail(n, key, "a ${ without the name of a variable and a } behind it; write ${NAME}, or $${ for a plain ${")
		}
		value, ok := d.getenv(name)
		if !ok {
			return "", d.fail(n, key, fmt.Sprintf("the environment variable %s is not set; set it, or write %s", name, want(key)))
		}
		b.WriteString(value)
		text = rest
	}
}

func isVariable(name string) bool {
	for i := range len(name) {
		c := name[i]
		letter := c == '_' || 'a' <= c|0x20 && c|0x20 <= 'z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return name != ""
}

func (d *decoder) text(into *string) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		s, err := d.scalar(key, n, "a text")
		if err != nil {
			return err
		}
		switch n.(type) {
		case *ast.StringNode, *ast.LiteralNode:
		default:
			return d.wrong(key, s, "not a text")
		}
		*into = s.text
		return nil
	}
}

func (d *decoder) texts(into *[]string) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		seq, ok := n.(*ast.SequenceNode)
		if !ok {
			return d.notA(key, n, "a list")
		}
		for i, v := range seq.Values {
			var text string
			if err := d.text(&text)(d.element(key, i, v), v); err != nil {
				return err
			}
			*into = append(*into, text)
		}
		return nil
	}
}

func (d *decoder) headers(into *map[string]string) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		headers := map[string]string{}
		err := d.eachKey(key, n, func(name string, _, value ast.Node) error {
			var text string
			if err := d.text(&text)(join(key, name), value); err != nil {
				return err
			}
			headers[name] = text
			return nil
		})
		if err == nil && len(headers) > 0 {
			*into = headers
		}
		return err
	}
}

func (d *decoder) number(into *int) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		s, err := d.scalar(key, n, "a number")
		if err != nil {
			return err
		}
		i, err := strconv.ParseInt(s.text, 10, 32)
		if err != nil || s.quoted && !s.substituted {
			return d.wrong(key, s, "not a number")
		}
		*into = int(i)
		return nil
	}
}

func (d *decoder) boolean(into *bool) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		s, err := d.scalar(key, n, "true or false")
		if err != nil {
			return err
		}
		if s.text != "true" && s.text != "false" || s.quoted && !s.substituted {
			return d.wrong(key, s, "neither true nor false")
		}
		*into = s.text == "true"
		return nil
	}
}

func (d *decoder) duration(into *time.Duration) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		s, err := d.scalar(key, n, "a duration")
		if err != nil {
			return err
		}
		if i, err := strconv.ParseInt(s.text, 10, 64); err == nil && i != 0 {
			return d.wrong(key, s, "a duration without its unit")
		}
		v, err := time.ParseDuration(s.text)
		if err != nil {
			return d.wrong(key, s, "not a duration")
		}
		*into = v
		return nil
	}
}

func (d *decoder) size(into *Size) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		s, err := d.scalar(key, n, "a size")
		if err != nil {
			return err
		}
		v, ok := parseSize(s.text)
		if !ok {
			return d.wrong(key, s, "not a size")
		}
		*into = v
		return nil
	}
}

func (d *decoder) buffers(into *[]Buffer) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		seq, ok := n.(*ast.SequenceNode)
		if !ok {
			return d.notA(key, n, "a list")
		}
		*into = nil
		for i, v := range seq.Values {
			b := ownBuffer()
			if isManaged(v) {
				b = managedBuffer()
			}
			if err := d.mapping(d.element(key, i, v), v, d.bufferEntries(&b)); err != nil {
				return err
			}
			*into = append(*into, b)
		}
		return nil
	}
}

// isManaged reports whether a buffer's mapping names the managed table, whose columns need not be written.
func isManaged(n ast.Node) bool {
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	}
	for _, v := range values {
		name, isName := v.Key.(*ast.StringNode)
		table, isText := v.Value.(*ast.StringNode)
		if isName && isText && name.Value == "table" && table.Value == ManagedTable {
			return true
		}
	}
	return false
}

func (d *decoder) topic(into *Topic) func(string, ast.Node) error {
	return func(key string, n ast.Node) error {
		*into = Topic{}
		switch n.(type) {
		case *ast.MappingNode, *ast.MappingValueNode:
			return d.mapping(key, n, []entry{{name: "value", read: d.text(&into.Value)}})
		}
		return d.text(&into.Column)(key, n)
	}
}

// element returns the key of the i-th element of a list and notes where it stands.
func (d *decoder) element(key string, i int, n ast.Node) string {
	key = fmt.Sprintf("%s[%d]", key, i)
	d.origins[key] = origin{line: d.line(n)}
	return key
}

// wrong is the error of a value that is what is said of it.
func (d *decoder) wrong(key string, s scalar, what string) error {
	p := problem{key: key, shown: s.shown, text: "is " + what + "; write " + want(key)}
	return d.fail(s.node, key, p.msg())
}

func (d *decoder) notA(key string, n ast.Node, kind string) error {
	if _, ok := n.(*ast.NullNode); ok {
		return d.fail(n, key, "no value; write "+want(key))
	}
	return d.fail(n, key, d.shape(n)+", not "+kind+"; write "+want(key))
}

// shape names what kind of node stands where another one belongs.
func (d *decoder) shape(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a set of keys"
	case *ast.SequenceNode:
		return "a list"
	case *ast.AnchorNode, *ast.AliasNode, *ast.TagNode, *ast.MergeKeyNode:
		return "a YAML anchor, alias or tag"
	}
	return "a single value"
}

// fail returns an error about the key at its line, else at the line of n.
func (d *decoder) fail(n ast.Node, key, msg string) error {
	line := d.line(n)
	if o, ok := d.origins[key]; ok {
		line = o.line
	}
	return &Error{File: d.file, Line: line, Key: shownKey(key), Msg: msg}
}

// located returns the error of a problem that Config.check found.
func (d *decoder) located(p *problem) error {
	e := &Error{File: d.file, Line: 1, Key: shownKey(p.key)}
	// A key that is not written itself, as the missing one of a pair or of a buffer, is at the nearest one around it.
	for key := p.key; ; {
		if o, ok := d.origins[key]; ok {
			e.Line = o.line
			if o.written != "" && p.shown != "" && key == p.key {
				p.shown = o.written
			}
			break
		}
		i := strings.LastIndexAny(key, ".[")
		if i < 0 {
			break
		}
		key = key[:i]
	}
	e.Msg = p.msg()
	return e
}

func (d *decoder) line(n ast.Node) int {
	if n == nil {
		return 1
	}
	tk := n.GetToken()
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 && !m.IsFlowStyle {
		tk = m.Values[0].Key.GetToken()
	}
	if tk == nil || tk.Position == nil {
		return 1
	}
	return max(1, tk.Position.Line)
}

func join(parent, name string) string {
	if parent == "" {
		return name
	}
	return parent + "." + name
}
