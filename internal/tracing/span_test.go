package tracing

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

// Receivers reject a batch with a string that is not UTF-8, with the spans of all other requests in it.
func TestSpansAreUTF8WhateverClientsSend(t *testing.T) {
	hostile := []byte("/a\xffb")
	for _, direction := range []flow.Direction{flow.Inbound, flow.Outbound} {
		p := &Policy{Tags: []Tag{{Name: "tag", Field: "x-tag"}}, MaxPath: len("/a\xff\u00e9") - 1} // ends within a character
		h := &flow.Request{
			Method: []byte("G\xffT"), Path: []byte("/a\xff\u00e9"), Authority: hostile, ID: hostile, UserAgent: hostile, GRPC: true,
			GRPCStatus: hostile, Trace: &flow.Trace{State: hostile},
		}
		h.Trace.Attributes = p.appendTags(nil, list{"x-tag: " + string(hostile)})
		span := p.appendSpan(nil, &flow.Record{HTTP: h, Direction: direction, Opened: time.Unix(0, 0)})
		if bytes.IndexByte(span, 0xff) >= 0 {
			t.Errorf("%v: a byte that is not UTF-8 in %q", direction, span)
		}
		if url := "/a?b/a??"; !bytes.Contains(span, []byte(url)) {
			t.Errorf("%v: not %s in %q", direction, url, span)
		}
		if n := strings.Count(string(span), "/a?b"); n < 5 {
			t.Errorf("%v: %d of the texts in %q", direction, n, span)
		}
	}
}
