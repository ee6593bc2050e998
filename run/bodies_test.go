package run

import (
	"bytes"
	"compress/flate"
	"compress/gzip"
	"compress/zlib"
	"io"
	"strings"
	"testing"

	"github.com/pillion-proxy/pillion/internal/flow"
)

func packed(text string, packer func(io.Writer) io.WriteCloser) string {
	var out bytes.Buffer
	w := packer(&out)
	io.WriteString(w, text)
	w.Close()
	return out.String()
}

// Bodies are shown as developer tools expect: decoded, as text or base64, with a remark about what is missing.
func TestBodiesAreShownDecoded(t *testing.T) {
	gz := packed("hello hello hello", func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) })
	zl := packed("hello", func(w io.Writer) io.WriteCloser { return zlib.NewWriter(w) })
	raw := packed("hello", func(w io.Writer) io.WriteCloser { f, _ := flate.NewWriter(w, 1); return f })
	bomb := packed(strings.Repeat("x", 1<<20), func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) })
	const limit = 2000
	for _, test := range []struct {
		name, body, encoding, transfer string
		text, shown, comment           string
		size                           int
	}{
		{"text", "hello", "", "", "hello", "", "", 5},
		{"chunks", "5\r\nhello\r\n0\r\n\r\n", "", "Chunked", "hello", "", "", 5},
		{"cut chunks", "9\r\nhello", "", "chunked", "hello", "", "", 5},
		{"gzip", gz, "gzip", "", "hello hello hello", "", "", 17},
		{"cut gzip", gz[:len(gz)-9], "GZIP", "", "hello hello hello", "", "the end of the body was not recorded", 17},
		{"deflate", zl, "deflate", "", "hello", "", "", 5},
		{"deflate without zlib", raw, "deflate", "", "hello", "", "", 5},
		{"too large when decoded", bomb, "gzip", "", strings.Repeat("x", limit), "", "the end of the body was not recorded", limit},
		{"not what it claims", "hello", "gzip", "", "aGVsbG8=", "base64", "the content-encoding gzip is not decoded", 5},
		{"brotli", "hello", "br", "", "aGVsbG8=", "base64", "the content-encoding br is not decoded", 5},
		{"binary", "\x00\x01", "", "", "AAE=", "base64", "", 2},
		{"other characters", "\xe4", "", "", "5A==", "base64", "", 1},
		{"cut character", strings.Repeat("x", limit-1) + "ä", "", "", strings.Repeat("x", limit-1), "", "the end of the body was not recorded", limit},
	} {
		body := flow.NewBodies(limit, 1<<20).Begin()
		body.Add([]byte(test.body))
		got := contentOf(body, []harField{{"Content-Encoding", test.encoding}, {"Transfer-Encoding", test.transfer}}, limit, true)
		if got.text != test.text || got.encoding != test.shown || got.comment() != test.comment || got.size != test.size {
			t.Errorf("%s: %d bytes, encoding %q, comment %q: %.200q", test.name, got.size, got.encoding, got.comment(), got.text)
		}
	}
}

func TestCredentialsInBodiesAreMasked(t *testing.T) {
	for _, test := range []struct{ kind, text, want string }{
		{"application/json", `{"Password" : "a\"b", "x":"password", "n":1}`, `{"Password" : "(masked)", "x":"password", "n":1}`},
		{"application/json", `{"client_secret":"cut in the mid`, `{"client_secret":"(masked)"`},
		{"application/json", `{"token":17}`, `{"token":"(masked)"}`},
		{"application/x-www-form-urlencoded; charset=utf-8", "a=b&api_key=c", "a=b&api_key=%28masked%29"},
		{"text/plain", "a=b&api_key=c", "a=b&api_key=c"},
	} {
		if got := maskText(test.text, test.kind); got != test.want {
			t.Errorf("%s: %q becomes %q, want %q", test.kind, test.text, got, test.want)
		}
	}
}
