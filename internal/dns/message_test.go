package dns

import (
	"fmt"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func TestTruncationFitsEveryLimitAndKeepsWhatItCan(t *testing.T) {
	q := question("example.", dns.TypeTXT)
	for _, options := range []int{-1, 0, 40, 700} { // bytes in the OPT; -1: no OPT
		m := answered(q)
		for i := range 40 {
			m.Answer = append(m.Answer, answered(q, fmt.Sprintf("example. 60 TXT %s", strings.Repeat("x", 10+i))).Answer...)
		}
		m.Ns = answered(q, "example. 60 NS ns.example.").Answer
		m.Extra = answered(q, "ns.example. 60 A 192.0.2.1").Answer
		if options >= 0 {
			withOPT(m, 4096)
			if options > 0 {
				m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_LOCAL{Code: 65001, Data: make([]byte, options-4)}}
			}
		}
		m.Compress = true
		whole, err := parse(pack(t, m))
		if err != nil {
			t.Fatal(err)
		}
		for limit := plainSize; limit <= len(whole.raw); limit++ {
			prefixed, cut := whole.fit(limit)
			raw := prefixed[2:]
			got := new(dns.Msg)
			if err := got.Unpack(raw); err != nil {
				t.Fatalf("options %d, limit %d: %v", options, limit, err)
			}
			opt := got.IsEdns0()
			kept := len(got.Answer) + len(got.Ns) + len(got.Extra)
			all := len(m.Answer) + len(m.Ns) + len(m.Extra)
			switch {
			case len(raw) > limit:
				t.Fatalf("options %d: %d bytes do not fit %d", options, len(raw), limit)
			case cut != (limit < len(whole.raw)), got.Truncated != cut, (kept == all) == cut && options < 700:
				t.Fatalf("options %d, limit %d: cut %t, TC %t, %d of %d records", options, limit, cut, got.Truncated, kept, all)
			case (opt != nil) != (options >= 0):
				t.Fatalf("options %d, limit %d: the OPT is %v", options, limit, opt)
			case limit-len(raw) > 12+50:
				t.Fatalf("options %d: %d of %d bytes are left, enough for another record", options, limit-len(raw), limit)
			}
		}
	}
}
