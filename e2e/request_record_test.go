package e2e

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// requestRecord waits for the record of a request that contains all of parts, and returns it. Only this function depends on
// the form of these records.
func (s *stage) requestRecord(t testing.TB, parts ...string) string {
	t.Helper()
	return s.agent.log.await(t, append([]string{"msg=request"}, parts...)...)
}

func TestEachRequestHasARecord(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	handler := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(299)
		io.WriteString(w, "answer")
	}
	s.everyDialogue(t, handler, func(t *testing.T, d *dialogue) {
		request := d.request(t, "PUT", "/record?of=this", strings.NewReader("question"))
		request.Host = "some.example"
		request.Header.Set("X-Request-Id", d.url)
		text(t, d.do(t, request))
		line := s.requestRecord(t, "original_destination="+d.url[len("http://"):])
		protocol := "HTTP/1.1"
		if d.http2 {
			protocol = "HTTP/2"
		}
		for key, want := range map[string]string{
			"direction": strings.Fields(d.name)[0], "protocol": protocol, "method": "PUT", "authority": "some.example",
			"status": "299", "received": "8", "sent": "6", "reason": "completed", "details": "via_upstream", "request_id": d.url,
		} {
			if got := attribute(t, line, key); got != want {
				t.Errorf("%s: got %s, want %s: %s", key, got, want, line)
			}
		}
		if !strings.Contains(line, "/record?of=this") {
			t.Errorf("no path in: %s", line)
		}
	})
}
