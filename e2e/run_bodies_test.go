package e2e

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// recordedBodies are the parts of an archive that show bodies.
type recordedBodies struct {
	Log struct{ Entries []recordedEntry }
}

type recordedEntry struct {
	StartedDateTime string
	Request         struct {
		URL      string
		BodySize int
		PostData struct{ MimeType, Text, Encoding, Comment string }
	}
	Response struct {
		BodySize int
		Content  struct {
			Size, Compression       int
			Text, Encoding, Comment string
		}
	}
}

// bodiesServer has responses of all kinds by their path.
func bodiesServer(t *testing.T, c *caller) {
	listener := c.peer.Listen(t, "tcp", "203.0.113.80:80")
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		switch r.URL.Path {
		case "/json":
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"name":"ä","access_token":"geheim"}`)
		case "/gzip":
			w.Header().Set("Content-Type", "text/plain")
			w.Header().Set("Content-Encoding", "gzip")
			packed := gzip.NewWriter(w)
			io.WriteString(packed, strings.Repeat("packed ", 1000))
			packed.Close()
		case "/binary":
			w.Write([]byte{0, 1, 0xff})
		case "/chunks":
			for range 3 {
				io.WriteString(w, "a part ")
				w.(http.Flusher).Flush()
			}
		case "/large":
			w.Header().Set("Content-Length", "1000000")
			w.Write(bytes.Repeat([]byte("0123456789"), 100_000))
		}
	})}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(listener) }()
	t.Cleanup(func() { server.Close(); <-done })
}

// archiveOf runs a command, and returns the archive of its requests, by their start: two connections may end in either order.
func (c *caller) archiveOf(t *testing.T, home string, flags []string, command ...string) (text string, archive recordedBodies) {
	t.Helper()
	file := filepath.Join(home, "bodies.har")
	_, stderr, status := c.run(t, append(append(append([]string{"--log", "off", "--record", file}, flags...), "--"), command...)...)
	if status != 0 {
		t.Fatalf("exit status %d\n%s", status, stderr)
	}
	raw, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(raw, &archive)
	}
	if err != nil {
		t.Fatal(err)
	}
	slices.SortStableFunc(archive.Log.Entries, func(a, b recordedEntry) int { return strings.Compare(a.StartedDateTime, b.StartedDateTime) })
	return string(raw), archive
}

// With --record-bodies, an archive has bodies in both versions of HTTP: text as text, the rest in base64, without the framing
// of chunks and content-encodings, up to the limit, and with credentials masked.
func TestRunRecordsBodies(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		bodiesServer(t, c)
		home := c.home(t)
		for _, version := range []string{"--http1.1", "--http2-prior-knowledge"} {
			const script = `for path in json gzip binary chunks large; do curl -sS --fail --noproxy "*" $0 -o /dev/null -d "user=me&password=geheim" http://web.example/$path; done`
			get := []string{"sh", "-c", script, version}
			text, archive := c.archiveOf(t, home, []string{"--record-bodies=8Ki"}, get...)
			if strings.Contains(text, "geheim") {
				t.Errorf("%s: credentials are in clear:\n%s", version, text)
			}
			if len(archive.Log.Entries) != 5 {
				t.Fatalf("%s: the archive is\n%.3000s", version, text)
			}
			const cut = "the end of the body was not recorded"
			for i, want := range []struct {
				text, encoding, comment string
				size                    int
			}{
				{`{"name":"ä","access_token":"(masked)"}`, "", "", 37},
				{strings.Repeat("packed ", 1000), "", "", 7000},
				{"AAH/", "base64", "", 3},
				{"a part a part a part ", "", "", 21},
				{strings.Repeat("0123456789", 820)[:8<<10], "", cut, 1_000_000},
			} {
				e := archive.Log.Entries[i]
				if got := e.Response.Content; got.Text != want.text || got.Encoding != want.encoding || got.Comment != want.comment || got.Size != want.size {
					t.Errorf("%s: %s has the content %.300v", version, e.Request.URL, got)
				}
				if got := e.Response; i == 1 && got.Content.Compression != got.Content.Size-got.BodySize || got.BodySize == 0 {
					t.Errorf("%s: %s has %d bytes, and saves %d", version, e.Request.URL, got.BodySize, got.Content.Compression)
				}
				if got := e.Request.PostData; got.Text != "user=me&password=%28masked%29" || got.MimeType != "application/x-www-form-urlencoded" || e.Request.BodySize != 23 {
					t.Errorf("%s: %s has sent %+v", version, e.Request.URL, got)
				}
			}
		}
		get := []string{"curl", "-sS", "--noproxy", "*", "-o", "/dev/null", "-d", "password=geheim", "http://web.example/json"}
		if text, _ := c.archiveOf(t, home, []string{"--record-bodies", "--record-credentials"}, get...); strings.Count(text, "geheim") != 2 {
			t.Errorf("with --record-credentials, the archive is\n%s", text)
		}
		if text, archive := c.archiveOf(t, home, nil, get...); archive.Log.Entries[0].Response.Content.Text != "" || strings.Contains(text, "password") {
			t.Errorf("without --record-bodies, the archive is\n%s", text)
		}
		_, stderr, status := c.run(t, "--record-bodies", "--record", filepath.Join(home, "lines.jsonl"), "--", "true")
		if status != 2 || !strings.Contains(stderr, "--record FILE.har") {
			t.Errorf("without an archive, the exit status is %d\n%s", status, stderr)
		}
	})
}

// With --decrypt, bodies inside TLS are recorded.
func TestRunRecordsBodiesInsideTLS(t *testing.T) {
	eachCaller(t, func(t *testing.T, c *caller) {
		s := newSite(t, c)
		for _, version := range []string{"--http1.1", "--http2"} {
			// The variable for roots is set outside, because pillion verifies the server with them.
			t.Run(version, func(t *testing.T) {
				file := filepath.Join(s.home, "bodies.har")
				cmd := c.command("--decrypt", "--log", "off", "--record", file, "--record-bodies", "--", "curl", "-sS", "--noproxy", "*", version, "https://good.example/inside")
				cmd.Env = append(cmd.Env, "TMPDIR="+s.home, "XDG_RUNTIME_DIR="+s.home, "SSL_CERT_FILE="+s.roots)
				if out, err := c.net.Run(cmd); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				text, err := os.ReadFile(file)
				var archive recordedBodies
				if err == nil {
					err = json.Unmarshal(text, &archive)
				}
				if err != nil || len(archive.Log.Entries) != 1 || !strings.HasPrefix(archive.Log.Entries[0].Response.Content.Text, "/inside by HTTP/") {
					t.Errorf("%v; the archive is\n%s", err, text)
				}
			})
		}
	})
}
