package terminal

import (
	"fmt"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/certview"
)

// Identity renders the workload's certificate and roots of trust, as they are at now.
func Identity(i *certview.Identity, now time.Time, p Painter) string {
	t := facts{paint: p}
	t.title("Certificate of this workload, from " + map[string]string{"CA": "the CA", "files": "files", "socket": "the workload socket"}[i.Source])
	if len(i.Chain) == 0 {
		t.fact("state", p.Paint(red, "there is none yet"))
	} else {
		t.fact("identity", orNone(i.SPIFFE, "none: the certificate has not exactly one SPIFFE ID"))
		t.certificate(&i.Chain[0], now)
		t.chain(i.Chain[1:], now)
	}
	if !i.Renewal.IsZero() {
		t.fact("renewal", fmt.Sprintf("%s (%s); %d certificates so far, %d failures", stamp(i.Renewal), until(i.Renewal, now), i.Renewals, i.Failures))
	}
	if i.Why != "" {
		t.fact("", p.Paint(red, "the last attempt failed: "+printable(i.Why)))
	}
	t.title("Roots of trust")
	for k := range i.Roots {
		t.root(&i.Roots[k], now)
	}
	if len(i.Roots) == 0 {
		t.line("  none")
	}
	if i.Revocations {
		t.line("  Revocation lists are in force.")
	}
	return t.String()
}

// Handshake renders what a server presents.
func Handshake(h *certview.Handshake, now time.Time, p Painter) string {
	t := facts{paint: p}
	where := printable(h.Address)
	if h.Peer != "" && h.Peer != h.Address {
		where += " (" + printable(h.Peer) + ")"
	}
	t.title(where)
	if h.Version != "" {
		t.fact("TLS", h.Version+", "+h.Cipher)
		t.fact("ALPN", fmt.Sprintf("%s offered, %s", orNone(strings.Join(h.Offered, " "), "none"), orNone(printable(h.Protocol), "none agreed on")))
	}
	t.fact("SNI", orNone(printable(h.ServerName), "not sent"))
	if len(h.Chain) > 0 {
		t.fact("identity", orNone(printable(h.SPIFFE), "no SPIFFE ID"))
		t.certificate(&h.Chain[0], now)
		t.chain(h.Chain[1:], now)
	}
	t.client(h)
	t.verdict(h)
	return t.String()
}

// client renders the client's part of a handshake.
func (t *facts) client(h *certview.Handshake) {
	switch {
	case !h.Requested && h.Version != "":
		t.fact("client", "the server has not asked for a certificate")
	case h.Requested && h.Presented == "":
		t.fact("client", "the server asks for a certificate, and none was presented")
	case h.Requested:
		t.fact("client", "presented "+printable(h.Presented))
	}
	for k, name := range h.AcceptableCAs {
		t.fact([]string{"CAs", ""}[min(k, 1)], printable(name))
	}
	if h.Requested && len(h.AcceptableCAs) == 0 {
		t.fact("CAs", "the server names none")
	}
}

// verdict renders what each side says of the other.
func (t *facts) verdict(h *certview.Handshake) {
	if h.Error != "" {
		t.fact("failed", t.paint.Paint(red, printable(h.Error)))
	}
	if h.Rejected != "" {
		t.fact("rejected", t.paint.Paint(red, "by the server: "+printable(h.Rejected)))
	}
	switch {
	case h.Refused != "":
		t.fact("verified", t.paint.Paint(red, "no: "+printable(h.Refused)))
	case h.Verified:
		t.fact("verified", t.paint.Paint(green, "by the roots of trust"))
	case len(h.Chain) > 0:
		t.fact("verified", t.paint.Paint(yellow, "no: there are no roots of trust to verify it with"))
	}
}

// facts is a text of titles and of names with their values.
type facts struct {
	strings.Builder
	paint Painter
}

func (t *facts) title(text string) {
	if t.Len() > 0 {
		t.line("")
	}
	t.line(t.paint.Paint(Bold, text))
}

func (t *facts) line(text string) { t.WriteString(text + "\n") }

func (t *facts) fact(name, value string) {
	t.line("  " + t.paint.Paint(Faint, fmt.Sprintf("%-9s", name)) + " " + value)
}

func (t *facts) certificate(c *certview.Certificate, now time.Time) {
	for _, names := range []struct{ name, value string }{{"DNS", c.DNS}, {"IP", c.IPs}, {"subject", c.Subject}} {
		if names.value != "" {
			t.fact(names.name, printable(names.value))
		}
	}
	t.fact("issuer", printable(c.Issuer))
	t.fact("serial", c.Serial)
	t.fact("SHA-256", c.SHA256)
	t.fact("key", c.Key)
	t.fact("valid", stamp(c.NotBefore)+" to "+stamp(c.NotAfter)+", "+t.validity(c, now))
}

// validity renders how long a certificate is still valid.
func (t *facts) validity(c *certview.Certificate, now time.Time) string {
	switch left := c.NotAfter.Sub(now); {
	case now.Before(c.NotBefore):
		return t.paint.Paint(red, "not valid yet")
	case left < 0:
		return t.paint.Paint(red, "expired "+showAge(-left.Seconds())+" ago")
	default:
		return showAge(left.Seconds()) + " left"
	}
}

// chain renders the certificates behind the first.
func (t *facts) chain(rest []certview.Certificate, now time.Time) {
	for k := range rest {
		t.fact([]string{"chain", ""}[min(k, 1)], t.inShort(&rest[k], now))
	}
}

func (t *facts) root(c *certview.Certificate, now time.Time) { t.line("  " + t.inShort(c, now)) }

func (t *facts) inShort(c *certview.Certificate, now time.Time) string {
	return fmt.Sprintf("%s, serial %s, until %s, %s", orNone(printable(c.Subject), "no subject"), c.Serial, stamp(c.NotAfter), t.validity(c, now))
}

func orNone(text, none string) string {
	if text == "" {
		return none
	}
	return text
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

// until renders the time from now to t.
func until(t, now time.Time) string {
	if left := t.Sub(now); left >= 0 {
		return "in " + showAge(left.Seconds())
	}
	return "due"
}
