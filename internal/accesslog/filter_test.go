package accesslog

import (
	"strings"
	"testing"
	"time"

	"github.com/pillion-proxy/pillion/internal/flow"
)

func TestFilters(t *testing.T) {
	ended := func(direction flow.Direction, reason flow.Reason, status int, flags string, took time.Duration) *flow.Record {
		r := request(direction, reason)
		r.HTTP.Status, r.HTTP.Flags, r.Duration = status, flags, took
		return r
	}
	var (
		fine        = ended(flow.Inbound, flow.Completed, 200, "", time.Millisecond)
		slow        = ended(flow.Outbound, flow.Completed, 200, "", time.Second)
		notFound    = ended(flow.Inbound, flow.Completed, 404, "", time.Millisecond)
		broken      = ended(flow.Inbound, flow.Completed, 500, "", time.Millisecond)
		unavailable = ended(flow.Inbound, flow.Completed, 200, "", time.Millisecond)
		malformed   = ended(flow.Inbound, flow.BadFraming, 400, "DPE", time.Millisecond)
		tcp         = connection(flow.Outbound, flow.Opaque, flow.Closed)
		headLate    = ended(flow.Inbound, flow.HeadTimeout, 408, "", time.Millisecond)
		refused     = connection(flow.Outbound, flow.Opaque, flow.UpstreamRefused)
		drained     = connection(flow.Inbound, flow.Opaque, flow.Drained)
		stillOpen   = connection(flow.Inbound, flow.TLS, "")
		everything  = []*flow.Record{fine, slow, notFound, broken, unavailable, malformed, tcp, headLate, refused, drained, stillOpen}
	)
	unavailable.HTTP.GRPC, unavailable.HTTP.GRPCStatus = true, []byte("14")
	for _, c := range []struct {
		filter string
		taken  []*flow.Record
	}{
		{"", everything},
		{" ", everything},
		{"sample=100%", everything},
		{"errors", []*flow.Record{broken, unavailable, malformed, headLate, refused}},
		{"status=404", []*flow.Record{notFound}},
		{"status=5xx|400-404", []*flow.Record{notFound, broken, malformed}},
		{"status=0", []*flow.Record{tcp, refused, drained, stillOpen}},
		{"slower=250ms", []*flow.Record{slow}},
		{"slower=231ms,direction=inbound", []*flow.Record{drained, stillOpen}},
		{"direction=outbound", []*flow.Record{slow, tcp, refused}},
		{"errors, direction=outbound", []*flow.Record{refused}},
		{"errors; slower=250ms", []*flow.Record{slow, broken, unavailable, malformed, headLate, refused}},
		{"errors;sample=0.0000000001%", []*flow.Record{broken, unavailable, malformed, headLate, refused}},
	} {
		f, err := ParseFilter(c.filter)
		if err != nil {
			t.Errorf("%s: %v", c.filter, err)
			continue
		}
		taken := 0
		for i, r := range everything {
			if got := f.match(r, r.Duration); got {
				if taken == len(c.taken) || c.taken[taken] != r {
					t.Errorf("%s: record %d is selected", c.filter, i)
				}
				taken++
			}
		}
		if taken != len(c.taken) {
			t.Errorf("%s: %d records are selected, want %d", c.filter, taken, len(c.taken))
		}
	}
}

func TestSample(t *testing.T) {
	f, err := ParseFilter("errors;sample=10%")
	if err != nil {
		t.Fatal(err)
	}
	r, taken := request(flow.Inbound, flow.Completed), 0
	for range 100_000 {
		if f.match(r, 0) {
			taken++
		}
	}
	if taken < 9_000 || taken > 11_000 { // ten standard deviations
		t.Errorf("%d of 100000", taken)
	}
}

func TestErrorsOfInvalidFilters(t *testing.T) {
	for text, want := range map[string]string{
		"error":               `access log filter: term "error": unknown term; use errors, status=5xx`,
		"errors;":             `term ""`,
		"errors=1":            "errors takes no value",
		"status=":             `"" is not a status; write status=404`,
		"status=6x":           `"6x" is not a status`,
		"status=500-400":      `"500-400" is not a status`,
		"status=1000":         `"1000" is not a status`,
		"status=5xx-6xx":      `"5xx-6xx" is not a status`,
		"slower=5":            `"5" is not a duration; write slower=250ms`,
		"slower=-5s":          `"-5s" is not a duration`,
		"direction=in":        `"in" is not a direction`,
		"sample=10":           `"10" is not a share; write sample=10%`,
		"sample=0%":           "is not a share",
		"sample=101%":         "is not a share",
		"sample=NaN%":         "is not a share",
		"status=4xx,status=5": `"status=4xx,status=5" has status twice; separate alternatives by a semicolon`,
	} {
		if _, err := ParseFilter(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %s", text, err, want)
		}
	}
}

func FuzzParsers(f *testing.F) {
	f.Add(Default)
	f.Add(DefaultJSON)
	f.Add(`{"a":["%START_TIME(%s)%",{"b":"%REQ(A?B):3%"}]}`)
	f.Add("errors;status=4xx|500-599,slower=1s;sample=1%,direction=inbound")
	f.Fuzz(func(t *testing.T, text string) {
		r := request(flow.Inbound, flow.Completed)
		if filter, err := ParseFilter(text); err == nil {
			filter.match(r, 0)
		}
		if format, err := ParseFormat(text); err == nil {
			if line := lineOf(format, r); strings.Contains(line, "\n") || len(line) > maxLine {
				t.Errorf("%q", line)
			}
		}
		if format, err := ParseJSONFormat(text); err == nil {
			checkJSON(t, lineOf(format, r))
		}
	})
}
