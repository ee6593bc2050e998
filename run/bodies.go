package run

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"encoding/base64"
	"errors"
	"io"
	"mime"
	"net/http/httputil"
	"regexp"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// MaxBodies bounds the recorded bodies that are in memory, until they are written.
const MaxBodies = 64 << 20

// bodies are those of an entry, until it is written.
type bodies struct{ request, response *flow.Body }

func (b *bodies) release() {
	b.request.Release()
	b.response.Release()
}

// addTo adds the bodies to an entry. Texts have credentials masked if mask is set.
func (b *bodies) addTo(e *harEntry, limit int, mask bool) {
	if b.request != nil && len(b.request.Bytes()) > 0 {
		content := contentOf(b.request, e.Request.Headers, limit, mask)
		e.Request.PostData = &harPostData{
			MimeType: valueOf(e.Request.Headers, "content-type"), Params: []harField{}, Text: content.text, Encoding: content.encoding, Comment: content.comment(),
		}
	}
	if b.response == nil || len(b.response.Bytes()) == 0 {
		return
	}
	content := contentOf(b.response, e.Response.Headers, limit, mask)
	to := &e.Response.Content
	to.Text, to.Encoding, to.Comment = content.text, content.encoding, content.comment()
	if content.decoded && !content.cut {
		to.Compression = int64(content.size) - e.Response.BodySize
		to.Size = int64(content.size)
	}
}

// content is a body as an archive shows it.
type content struct {
	text     string
	encoding string // base64; empty: text
	size     int    // bytes after decoding
	decoded  bool   // a content-encoding was removed
	cut      bool   // the end is missing
	unknown  string // the content-encoding that is still there
}

func (c *content) comment() string {
	var parts []string
	if c.cut {
		parts = append(parts, "the end of the body was not recorded")
	}
	if c.unknown != "" {
		parts = append(parts, "the content-encoding "+c.unknown+" is not decoded")
	}
	return strings.Join(parts, "; ")
}

// contentOf decodes a body: the framing of chunks, and gzip and deflate, up to limit bytes. Text in UTF-8 stays text, and
// everything else becomes base64.
func contentOf(body *flow.Body, fields []harField, limit int, mask bool) (c content) {
	raw := body.Bytes()
	c.cut = body.Cut()
	if strings.Contains(strings.ToLower(valueOf(fields, "transfer-encoding")), "chunked") {
		raw, _ = io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(raw))) // a cut body ends early
	}
	raw = c.decode(raw, strings.ToLower(strings.TrimSpace(valueOf(fields, "content-encoding"))), limit)
	c.size = len(raw)
	text := raw
	if c.cut {
		text = wholeRunes(raw)
	}
	if c.unknown != "" || !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
		c.text, c.encoding = base64.StdEncoding.EncodeToString(raw), "base64"
		return c
	}
	c.text = string(text)
	if mask {
		c.text = maskText(c.text, valueOf(fields, "content-type"))
	}
	return c
}

// decode removes a content-encoding. A body that does not have it, or has another one, stays as it is.
func (c *content) decode(raw []byte, encoding string, limit int) []byte {
	if encoding == "" || encoding == "identity" {
		return raw
	}
	reader, err := decoder(raw, encoding)
	if err != nil {
		c.unknown = encoding
		return raw
	}
	plain, err := io.ReadAll(io.LimitReader(reader, int64(limit)+1))
	if len(plain) == 0 && err != nil {
		c.unknown = encoding
		return raw
	}
	c.decoded = true
	if len(plain) > limit {
		c.cut, plain = true, plain[:limit]
	}
	c.cut = c.cut || err != nil
	return plain
}

var errUnknownEncoding = errors.New("unknown content-encoding")

func decoder(raw []byte, encoding string) (io.Reader, error) {
	switch encoding {
	case "gzip", "x-gzip":
		return gzip.NewReader(bytes.NewReader(raw))
	case "deflate":
		if reader, err := zlib.NewReader(bytes.NewReader(raw)); err == nil {
			return reader, nil
		}
		return flate.NewReader(bytes.NewReader(raw)), nil // as some servers send it, against RFC 9110 §8.4.1.2
	}
	return nil, errUnknownEncoding
}

// wholeRunes returns text without the character that is cut at its end.
func wholeRunes(text []byte) []byte {
	for i := len(text) - 1; i >= max(0, len(text)-utf8.UTFMax); i-- {
		if utf8.RuneStart(text[i]) {
			if !utf8.FullRune(text[i:]) {
				return text[:i]
			}
			break
		}
	}
	return text
}

// secretMember is a member of a JSON object whose name contains one of secretWords, with its value, which may be cut.
var secretMember = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?i)("[^"\\]*(?:` + strings.Join(secretWords, "|") + `)[^"\\]*"\s*:\s*)("(?:[^"\\]|\\.)*"?|-?[0-9][0-9.eE+-]*)`)
})

// maskText masks credentials in forms and in JSON.
func maskText(text, mimeType string) string {
	kind, _, _ := mime.ParseMediaType(mimeType)
	if kind == "application/x-www-form-urlencoded" {
		return maskQuery(text)
	}
	return secretMember().ReplaceAllString(text, `${1}"`+masked+`"`)
}
