package configview

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/envoy"
	"github.com/pillion-proxy/pillion/internal/jwt"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
	"github.com/pillion-proxy/pillion/internal/urlpath"
)

// Question is a request that Explain follows.
type Question struct {
	Inbound     bool
	Method      string         // empty: GET
	URL         string         // with scheme and host; without a path it is /
	Fields      []Field        // the first one named host replaces the URL's host in the request
	Source      netip.Addr     // of an inbound client; invalid: conditions about it are neither met nor missed
	Destination netip.AddrPort // original destination; invalid: found by the URL's host and port
	Peer        string         // identity of a client with mutual TLS; empty: the client has no TLS
}

// Field is a header field.
type Field struct{ Name, Value string }

// Explanation is what becomes of a request, step by step. A step that is not reached is missing.
type Explanation struct {
	Request     string `json:"request"` // method and URL
	Direction   string `json:"direction"`
	Destination string `json:"destination"` // original

	Listener *Found    `json:"listener,omitempty"`
	Chain    *Chain    `json:"chain,omitempty"`
	Verdicts []Verdict `json:"policies,omitempty"`

	Table       string  `json:"table,omitempty"` // of routes
	VirtualHost *Found  `json:"virtualHost,omitempty"`
	Route       *Route  `json:"route,omitempty"`
	Tried       []Tried `json:"tried,omitempty"` // earlier routes, whose conditions the request does not meet

	Clusters []Target `json:"clusters,omitempty"`
	SentAs   string   `json:"sentAs,omitempty"` // the URL, if it is rewritten
	Timeouts string   `json:"timeouts,omitempty"`
	Retries  string   `json:"retries,omitempty"`

	Result string `json:"result"` // in words
}

// Found is an object, and why it is the one.
type Found struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Tried is a route that does not match.
type Tried struct {
	Route
	Close bool   `json:"close"` // its path matches
	Why   string `json:"why"`   // the first condition that the request does not meet
}

// Verdict is what a policy decides.
type Verdict struct {
	Name    string   `json:"name"`
	Per     string   `json:"per"`     // connection or request
	Verdict string   `json:"verdict"` // allowed, denied, or why it is not known
	Reasons []string `json:"reasons,omitempty"`
}

// Target is a cluster that the request may be sent to, and its part of the requests.
type Target struct {
	Cluster
	Share string `json:"share,omitempty"` // of several clusters, in percent
	SNI   string `json:"sni,omitempty"`
}

// maxTried bounds the routes that are listed.
const maxTried = 100

// InUse returns the endpoints of a cluster as they are in use now. It returns false for a cluster that is not in use.
type InUse func(cluster string) ([]Endpoint, bool)

// Explain follows a request through a snapshot. used may be nil. An error means that the question is not understood.
func Explain(s *mesh.Snapshot, q *Question, used InUse) (*Explanation, error) {
	if s == nil {
		return nil, errors.New("the control plane has sent no configuration yet")
	}
	w, err := newWalk(s, q)
	if err != nil {
		return nil, err
	}
	w.used = used
	w.listener()
	return &w.Explanation, nil
}

// walk is the way of a request.
type walk struct {
	Explanation
	snapshot *mesh.Snapshot
	question *Question
	used     InUse
	url      *url.URL
	info     mesh.ConnInfo
	request  route.Request
}

func newWalk(s *mesh.Snapshot, q *Question) (*walk, error) {
	u, err := ParseURL(q.URL)
	if err != nil {
		return nil, err
	}
	w := &walk{snapshot: s, question: q, url: u}
	method := cmp.Or(strings.ToUpper(q.Method), "GET")
	w.Request, w.Direction = method+" "+u.String(), "outbound"
	if q.Inbound {
		w.Direction = "inbound"
	}
	path := u.EscapedPath()
	if path == "" {
		path = "/"
	}
	if u.RawQuery != "" || u.ForceQuery {
		path += "?" + u.RawQuery
	}
	authority, fields := u.Host, q.Fields
	if i := slices.IndexFunc(fields, func(f Field) bool { return strings.EqualFold(f.Name, "host") }); i >= 0 {
		authority, fields = fields[i].Value, slices.Delete(slices.Clone(fields), i, i+1)
	}
	w.request = route.Request{
		Method: []byte(method), Path: []byte(path), Authority: []byte(authority), Scheme: []byte(u.Scheme), Fields: fieldList(fields),
		GRPC: slices.ContainsFunc(fields, func(f Field) bool {
			return strings.EqualFold(f.Name, "content-type") && strings.HasPrefix(f.Value, "application/grpc")
		}),
		Random: func() uint64 { return 999_999 }, // faults and mirrors of a part of the requests are not drawn
	}
	return w, w.locate()
}

// ParseURL returns the URL of a question.
func ParseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err == nil && (u.Host == "" || u.Scheme != "http" && u.Scheme != "https") {
		err = fmt.Errorf("%q is not a URL with a host: use one such as http://reviews:9080/path", text)
	}
	return u, err
}

type fieldList []Field

func (f fieldList) Len() int { return len(f) }

func (f fieldList) At(i int) (name, value []byte) { return []byte(f[i].Name), []byte(f[i].Value) }

// locate sets the original destination and what a listener sees of the connection.
func (w *walk) locate() error {
	port := uint64(80)
	if w.url.Scheme == "https" {
		port = 443
	}
	if text := w.url.Port(); text != "" {
		var err error
		if port, err = strconv.ParseUint(text, 10, 16); err != nil {
			return fmt.Errorf("%q is not a port", text)
		}
	}
	destination := w.question.Destination
	if !destination.IsValid() {
		destination = netip.AddrPortFrom(w.address(w.url.Hostname()), uint16(port))
	}
	w.Destination = destination.String()
	if destination.Addr().IsUnspecified() {
		w.Destination = fmt.Sprintf("port %d of an unknown address", destination.Port())
	}
	w.info = mesh.ConnInfo{Destination: destination, Protocols: []string{"http/1.1"}}
	if w.question.Inbound && w.question.Peer != "" {
		w.info.TLS, w.info.Protocols = true, []string{"istio-http/1.1", "istio", "http/1.1"}
	} else if w.url.Scheme == "https" {
		w.info.TLS, w.info.ServerName, w.info.Protocols = true, w.url.Hostname(), []string{"h2", "http/1.1"}
	}
	return nil
}

// address returns the address of a host: itself, or one that the control plane has for it, in its table of names or among
// the domains of a virtual host. The unspecified address stands for hosts whose address is not known.
func (w *walk) address(host string) netip.Addr {
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap()
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if names := w.snapshot.Names(); names != nil {
		if found := names.Hosts[host]; len(found.Addresses) > 0 {
			return found.Addresses[0]
		}
	}
	for _, routes := range w.snapshot.RouteTables() {
		for i := range routes.Hosts {
			if domains := routes.Hosts[i].Domains; slices.Contains(domains, mesh.Domain{Text: host}) {
				for _, d := range domains {
					if a, err := netip.ParseAddr(d.Text); err == nil {
						return a
					}
				}
			}
		}
	}
	return netip.IPv4Unspecified()
}

func (w *walk) refuse(format string, values ...any) {
	w.Result = "refused: " + fmt.Sprintf(format, values...)
}

func (w *walk) listener() {
	var l *mesh.Listener
	why := "no listener is for its destination"
	if !w.question.Inbound {
		if l = w.snapshot.Destination(w.info.Destination); l != nil {
			why = "it is for " + addresses(l)
		}
	} else {
		why = "it accepts inbound connections"
	}
	if l == nil {
		l = w.snapshot.VirtualListener(w.question.Inbound)
	}
	if l == nil {
		w.Result = "carried to its original destination: the control plane has no listener for it"
		return
	}
	w.Listener = &Found{l.Name, why}
	chain := l.Meet(&w.info)
	switch {
	case l.Refused:
		w.refuse("the listener has parts that are not supported: see pillion config findings")
	case chain == nil:
		w.refuse("no filter chain accepts the connection")
	default:
		w.chain(l, chain)
	}
}

func addresses(l *mesh.Listener) string {
	var texts []string
	for _, a := range l.Addresses {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, ", ")
}

func (w *walk) chain(l *mesh.Listener, c *mesh.FilterChain) {
	match := matchWords(&c.Match)
	if c == l.Default {
		match = "others"
	}
	w.Chain = new(chainOf(c, match))
	if c.Refused {
		w.refuse("the filter chain has parts that are not supported: see pillion config findings")
		return
	}
	for i := range c.Policies {
		p := &c.Policies[i]
		if !w.judge(p.Name, "connection", p.RBAC, p.ExtAuthz) {
			return
		}
	}
	switch {
	case c.TCP != nil:
		w.toClusters(tcpShares(c.TCP))
		w.Result = "carried as bytes: its requests are not looked at"
	case c.HTTP != nil:
		w.http(c.HTTP)
	default:
		w.refuse("the filter chain leads nowhere")
	}
}

func tcpShares(t *mesh.TCPProxy) (list []share) {
	for _, c := range t.Clusters {
		list = append(list, share{c.Name, c.Weight})
	}
	return list
}

func (w *walk) http(h *mesh.HTTPManager) {
	form := urlpath.Form{Normalize: h.NormalizePath, MergeSlashes: h.MergeSlashes, Slashes: slashes[h.EscapedSlashes]}
	path, err := form.Append(nil, w.request.Path)
	if err != nil && !errors.Is(err, urlpath.ErrRedirect) {
		w.Result = "answered 400: " + err.Error()
		return
	}
	w.request.Path = path
	routes := w.snapshot.Routes(h)
	if routes == nil {
		w.refuse("the routes %s have not come", h.RouteName)
		return
	}
	w.Table = routes.Name
	choice, steps := route.Of(routes).Explain(&w.request)
	choice.Fault = w.snapshot.Fault(h)
	w.steps(&choice, steps)
	if w.filters(h, &choice) {
		w.outcome(&choice)
	}
}

var slashes = map[mesh.EscapedSlashes]urlpath.Slashes{
	mesh.RejectEscapedSlashes: urlpath.RejectSlashes, mesh.RedirectEscapedSlashes: urlpath.RedirectSlashes, mesh.UnescapeSlashes: urlpath.UnescapeSlashes,
}

func (w *walk) steps(c *route.Choice, steps []route.Step) {
	if c.Host == nil {
		return
	}
	w.VirtualHost = &Found{c.Host.Name, "its domain is " + c.Domain(&w.request)}
	for _, step := range steps {
		r := routeOf(step.Route, c.Host)
		if step.Why == "" {
			w.Route = &r
		} else if len(w.Tried) < maxTried {
			w.Tried = append(w.Tried, Tried{r, step.Close, step.Why})
		}
	}
}

// filters judges the policies that requests pass. It returns false if one denies the request.
func (w *walk) filters(h *mesh.HTTPManager, c *route.Choice) bool {
	for i := range h.Filters {
		f := w.snapshot.Filter(&h.Filters[i])
		if f == nil || f.Refused {
			w.refuse("the HTTP filter %s is not supported, or has not come", h.Filters[i].Name)
			return false
		}
		rbac, required := f.RBAC, jwt.ByRules
		if own := c.Policy(f.Name); own != nil {
			if own.Disabled {
				continue
			}
			if own.RBAC != nil {
				rbac = own.RBAC
			}
			required = jwt.Requirement{Own: true, Name: own.Requirement}
		} else if f.Disabled {
			continue
		}
		if f.JWT != nil && !w.verify(f.Name, f.JWT, required) || !w.judge(f.Name, "request", rbac, f.ExtAuthz) {
			return false
		}
	}
	return true
}

// judge adds the verdict of a policy. It returns false if that denies the request.
func (w *walk) judge(name, per string, rbac *mesh.RBAC, check *mesh.ExtAuthz) bool {
	switch {
	case check != nil:
		w.Verdicts = append(w.Verdicts, Verdict{Name: name, Per: per, Verdict: "not known: it " + authzWords(check)})
	case rbac != nil:
		subject := w.subject(per == "request")
		policy := authz.Compile(rbac)
		verdict := policy.Judge(subject)
		v := Verdict{Name: name, Per: per, Verdict: "allowed"}
		for _, reason := range policy.Explain(subject) {
			v.Reasons = append(v.Reasons, reason.String())
		}
		if verdict.Denied {
			v.Verdict = "denied"
			w.refuse("%s denies the %s", name, per)
		}
		w.Verdicts = append(w.Verdicts, v)
		return !verdict.Denied
	}
	return true
}

// verify adds the verdict about the request's tokens. Policies behind it see their claims.
func (w *walk) verify(name string, tokens *mesh.JWT, required jwt.Requirement) bool {
	v := Verdict{Name: name, Per: "request", Verdict: "allowed", Reasons: []string{"it " + jwtWords(tokens)}}
	result := jwt.Of(tokens).Check(&w.request, required, time.Now(), nil)
	if result.Claims != nil {
		w.request.Metadata = result.Claims
	}
	if result.Reply != nil {
		v.Verdict = "denied"
		v.Reasons = append(v.Reasons, result.Reply.Body)
		w.refuse("%s denies the request", name)
	}
	w.Verdicts = append(w.Verdicts, v)
	return result.Reply == nil
}

func (w *walk) subject(ofRequest bool) *authz.Subject {
	s := &authz.Subject{Destination: w.info.Destination, Peer: w.question.Source, Client: w.question.Source, ServerName: w.info.ServerName}
	if w.question.Peer != "" {
		s.Secured, s.Names = true, []string{w.question.Peer}
	}
	if ofRequest {
		r := &w.request
		s.Request = &authz.Request{Method: r.Method, Authority: r.Authority, Scheme: r.Scheme, Path: r.Path, Fields: r.Fields, Metadata: r.Metadata}
	}
	return s
}

func (w *walk) outcome(c *route.Choice) {
	switch {
	case c.Reply == route.Refused && w.Route == nil:
		w.refuse("the routes have parts that are not supported: see pillion config findings")
		return
	case c.Reply == route.Refused:
		w.refuse("the route has parts that are not supported: see pillion config findings")
		return
	case c.Reply != nil:
		w.answered(c.Reply)
		return
	}
	o := c.Outcome(&w.request, false)
	if o.Plan.RewritesHost || o.Plan.RewritesPath {
		w.SentAs = w.url.Scheme + "://" + string(o.Plan.AppendHost(nil, w.request.Authority)) + string(o.Plan.AppendPath(nil, w.request.Path))
	}
	after := ""
	if o.Delay > 0 {
		after = " after " + duration(o.Delay)
	}
	if o.ResponseRate > 0 {
		after += fmt.Sprintf(", at %d KiB/s", o.ResponseRate>>10)
	}
	if o.Reply != nil {
		w.answered(o.Reply)
		w.Result += after
		return
	}
	w.limits(o.Plan)
	var shares []share
	for _, cluster := range c.Route.Forward.Clusters {
		shares = append(shares, share{cluster.Name, cluster.Weight})
	}
	w.toClusters(shares)
	w.Result = "sent to " + sharesWords(shares) + after
	if len(shares) == 1 && w.snapshot.Cluster(shares[0].cluster) == nil {
		w.answered(c.Cluster.NotFound)
		w.Result += ": the cluster does not exist"
	}
}

func (w *walk) answered(r *route.Reply) {
	w.Result = fmt.Sprintf("answered %d", r.Status)
	for _, f := range r.Fields {
		w.Result += ", " + f.Name + ": " + f.Value
	}
	switch {
	case r == route.NoRoute && w.VirtualHost == nil:
		w.Result += ": no virtual host is for " + string(w.request.Authority)
	case r == route.NoRoute:
		w.Result += ": no route matches"
	case r.Flags == envoy.FlagFaultInjected:
		w.Result += " by fault injection"
	}
}

// limits describes the times and retries in force.
func (w *walk) limits(p *route.Plan) {
	total, try, stream := p.Timeouts(&w.request)
	var parts []string
	for _, limit := range []struct{ words, text string }{{"", duration(total)}, {" for each try", duration(try)}, {" for the stream", duration(stream)}} {
		if limit.text != "" {
			parts = append(parts, limit.text+limit.words)
		}
	}
	w.Timeouts = strings.Join(parts, ", ")
	if w.Timeouts == "" {
		w.Timeouts = "unlimited"
	}
	w.Retries = "as is safe"
	if policy := p.RetryOf(&w.request); policy != nil && !w.question.Inbound { // the workload is the only endpoint
		w.Retries = fmt.Sprintf("%d, on %s", policy.Retries, policy.On)
	}
}

func (w *walk) toClusters(shares []share) {
	total := uint64(0)
	for _, s := range shares {
		total += uint64(s.weight)
	}
	for _, s := range shares {
		t := Target{Cluster: Cluster{Object: Object{Name: s.cluster, State: Refused, Refusal: "it does not exist"}}}
		if c := w.snapshot.Cluster(s.cluster); c != nil {
			t.Object.State, t.Object.Refusal = Active, ""
			t.fill(c, w.endpoints(c))
			t.SNI = sni(c)
		}
		if len(shares) > 1 && total > 0 {
			t.Share = strconv.FormatFloat(100*float64(s.weight)/float64(total), 'g', 3, 64) + "%"
		}
		w.Clusters = append(w.Clusters, t)
	}
}

func (w *walk) endpoints(c *mesh.Cluster) []Endpoint {
	if w.used != nil {
		if list, ok := w.used(c.Name); ok {
			return list
		}
	}
	if to := w.info.Destination; c.Discovery == mesh.OriginalDestination && !to.Addr().IsUnspecified() {
		return []Endpoint{EndpointOf(c.Name, new(mesh.Locality), &mesh.Endpoint{Address: to, Weight: 1})}
	}
	return endpointsOf(c, w.snapshot.Hosts(c))
}

// sni returns the server name in the first TLS of a cluster.
func sni(c *mesh.Cluster) string {
	for _, t := range c.Transports {
		if t.TLS != nil {
			return t.TLS.SNI
		}
	}
	return ""
}
