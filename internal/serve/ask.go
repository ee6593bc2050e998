package serve

import (
	"context"
	"errors"
	"hash/maphash"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillion-proxy/pillion/internal/authz"
	"github.com/pillion-proxy/pillion/internal/budget"
	"github.com/pillion-proxy/pillion/internal/extauthz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/jwt"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// question is the httpforward.Check of a request that a server is asked about, or that needs keys which are being fetched.
// It keeps the answers of earlier questions about the request, so that a request is asked about once by each filter.
type question struct {
	answers []answered // never changed once done
	cancel  context.CancelFunc
	held    budget.Account // of the copy of the request; the goroutine that waits for a server owns it

	mu    sync.Mutex
	done  bool
	ready func() // nil: not set yet
}

// answered is the answer for a filter.
type answered struct {
	filter *mesh.ExtAuthz
	answer *extauthz.Answer
}

// Notify implements httpforward.Check.
func (q *question) Notify(ready func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ready = ready; q.done {
		ready()
	}
}

// Answered implements httpforward.Check.
func (q *question) Answered() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.done
}

// Cancel implements httpforward.Check.
func (q *question) Cancel() { q.cancel() }

// Interrupt implements budget.Owner: the memory of the process is used up.
func (q *question) Interrupt() { q.cancel() }

// Continue implements budget.Owner.
func (q *question) Continue() {}

// finish ends the question.
func (q *question) finish() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.done = true; q.ready != nil {
		q.ready()
	}
}

// answer returns the answer for a filter, or nil.
func (q *question) answer(filter *mesh.ExtAuthz) *extauthz.Answer {
	if q == nil {
		return nil
	}
	for i := range q.answers {
		if q.answers[i].filter == filter {
			return q.answers[i].answer
		}
	}
	return nil
}

// asking counts the questions of a role.
type asking struct {
	now                     atomic.Int64 // questions to servers that are in progress
	keys                    atomic.Int64 // requests that wait for keys
	allowed, denied, failed atomic.Uint64
}

// maxQuestions bounds the questions to servers that are in progress in a role. Beyond it, servers count as unreachable. It
// bounds the requests that wait for keys as well: beyond it, keys count as not fetched.
const maxQuestions = 4096

var (
	errTooManyQuestions = errors.New("too many questions are in progress")
	errNoCertificate    = errors.New("the connection began before servers were shown certificates of clients")
	errNobodyAsks       = errors.New("servers of external authorization are not reached here")
)

// ask begins to ask a server. before is the last question about the same request; it may be nil.
func (r *Role) ask(e *mesh.ExtAuthz, q *extauthz.Question, before *question) *question {
	ctx, cancel := context.WithCancel(context.Background())
	asked := &question{cancel: cancel}
	if before != nil {
		asked.answers = append(asked.answers, before.answers...)
	}
	switch {
	case r.callouts == nil:
		asked.answers = append(asked.answers, answered{e, extauthz.Failed(e, errNobodyAsks)})
		asked.finish()
	case e.PeerCert && q.Certified && q.Certificate == "":
		r.asking.failed.Add(1)
		asked.answers = append(asked.answers, answered{e, extauthz.Failed(e, errNoCertificate)})
		asked.finish()
	case r.asking.now.Add(1) > maxQuestions:
		r.asking.now.Add(-1)
		r.asking.failed.Add(1)
		asked.answers = append(asked.answers, answered{e, extauthz.Failed(e, errTooManyQuestions)})
		asked.finish()
	default:
		asked.held.Open(r.budget, asked, q.Source.Addr())
		asked.held.Hold(heldBy(q)) // an eviction cancels the question
		go r.await(ctx, asked, e, q)
	}
	return asked
}

// heldBy returns how many bytes a question holds while its server is asked: a goroutine with its stack, the question, and the
// message that is made of it.
func heldBy(q *extauthz.Question) int {
	const goroutine, field = 8 << 10, 32 // a route.Field
	n, body := 0, 0
	if r := q.Request; r != nil {
		body = len(r.Body)
		n = len(r.ID) + len(r.Method) + len(r.Scheme) + len(r.Host) + len(r.Path) + body
		for i := range r.Fields {
			n += field + len(r.Fields[i].Name) + len(r.Fields[i].Value)
		}
	}
	return goroutine + 2*n + 2*body
}

// await asks a server, and waits for its answer.
func (r *Role) await(ctx context.Context, asked *question, e *mesh.ExtAuthz, q *extauthz.Question) {
	defer r.asking.now.Add(-1)
	defer asked.cancel()
	answer := extauthz.Ask(ctx, r.callouts, e, q)
	if answer.Err != nil && asked.held.Evicted() {
		answer = extauthz.Failed(e, budget.ErrEvicted)
	}
	asked.held.Close()
	switch {
	case answer.Err != nil:
		r.asking.failed.Add(1)
	case answer.Denied:
		r.asking.denied.Add(1)
	default:
		r.asking.allowed.Add(1)
	}
	asked.answers = append(asked.answers, answered{e, answer})
	asked.finish()
}

// awaitKeys returns the question of a request that needs keys which are being fetched; nil: too many requests wait for keys.
func (r *Role) awaitKeys(from *mesh.RemoteKeys, before *question) *question {
	ctx, cancel := context.WithCancel(context.Background())
	q := &question{cancel: cancel}
	if before != nil {
		q.answers = before.answers
	}
	fetched := r.keys.Fetched(from)
	if fetched == nil {
		cancel()
		q.finish()
		return q
	}
	if r.asking.keys.Add(1) > maxQuestions {
		r.asking.keys.Add(-1)
		cancel()
		return nil
	}
	go func() {
		defer cancel()
		select {
		case <-fetched:
		case <-ctx.Done():
		}
		r.asking.keys.Add(-1)
		q.finish()
	}()
	return q
}

// asks reports whether requests may have to wait: for the answer of a server, or for keys of tokens.
func asks(s *mesh.Snapshot, h *mesh.HTTPManager) bool {
	for i := range h.Filters {
		f := s.Filter(&h.Filters[i])
		switch {
		case f == nil:
		case f.ExtAuthz != nil && !f.ExtAuthz.Shadow:
			return true // also if it is disabled, since a route may enable it
		case !f.Disabled && f.JWT != nil && slices.ContainsFunc(f.JWT.Providers, func(p mesh.JWTProvider) bool { return p.Remote != nil }):
			return true
		}
	}
	return false
}

// showsCertificates reports whether servers see the certificates of clients.
func showsCertificates(s *mesh.Snapshot, chain *mesh.FilterChain) bool {
	for i := range chain.Policies {
		if e := chain.Policies[i].ExtAuthz; e != nil && e.PeerCert {
			return true
		}
	}
	if chain.HTTP != nil {
		for i := range chain.HTTP.Filters {
			if f := s.Filter(&chain.HTTP.Filters[i]); f != nil && f.ExtAuthz != nil && f.ExtAuthz.PeerCert {
				return true
			}
		}
	}
	return false
}

// present are keys that requests do not wait for: those that are being fetched count as not fetched.
type present struct{ store jwt.Keys }

// Keys implements jwt.Keys.
func (p present) Keys(from *mesh.RemoteKeys) (keys *jwt.KeySet, known bool) {
	keys, _ = p.store.Keys(from)
	return keys, true
}

// Renew implements jwt.Keys.
func (p present) Renew(*mesh.RemoteKeys) bool { return false }

// ext applies a filter of external authorization to a request. waits is the question that has to be answered first.
func (g *gate) ext(r *httpforward.Request, e *mesh.ExtAuthz, settings *mesh.CheckSettings) (reply *route.Reply, waits *question) {
	switch {
	case e.Refused:
		return route.Refused, nil
	case e.Shadow, e.When != nil && g.Match(e.When) == match.No:
		return nil, nil
	}
	before, _ := r.Check.(*question)
	answer := before.answer(e)
	switch {
	case answer != nil:
	case !draws(e, r.Seed):
		return nil, nil
	case g.role == nil:
		return extauthz.Failed(e, errNobodyAsks).Reply, nil
	default:
		body := bodyOf(e, settings)
		if reply, waits = g.needs(r, body); reply != nil || waits != nil {
			return reply, waits
		}
		return nil, g.role.ask(e, g.question(r, body, settings), before)
	}
	if answer.Denied {
		return answer.Reply, nil
	}
	g.take(r, e, answer)
	return nil, nil
}

// bodyFirst stands for a question that needs the body of the request.
var bodyFirst = new(question)

// await sets what a request waits for.
func (g *gate) await(waits *question, d *httpforward.Decision) {
	if waits == bodyFirst {
		d.Collect = g.collect
	} else {
		d.Check = waits
	}
}

// bodyOf returns how a server sees a request's body; nil: it does not.
func bodyOf(e *mesh.ExtAuthz, settings *mesh.CheckSettings) *mesh.AuthzBody {
	switch {
	case settings == nil:
	case settings.NoBody:
		return nil
	case settings.Body != nil:
		return settings.Body
	}
	return e.Body
}

// needs returns bodyFirst if the part of a request's body is missing that a server sees, and a reply if that part must be the
// whole body and is not.
func (g *gate) needs(r *httpforward.Request, body *mesh.AuthzBody) (*route.Reply, *question) {
	c := r.Collected
	switch {
	case body == nil:
		return nil, nil
	case !body.AllowPartial && declaredLength(r.Fields) > int64(body.MaxBytes):
		return bodyTooLarge, nil
	case c == nil || c.Wanted < body.MaxBytes:
		g.collect = body.MaxBytes
		return nil, bodyFirst
	case !body.AllowPartial && !wholeIn(c, body):
		return bodyTooLarge, nil
	}
	return nil, nil
}

// wholeIn reports whether all of a body is shown.
func wholeIn(c *httpforward.Collected, body *mesh.AuthzBody) bool {
	return c.Whole && len(c.Bytes) <= int(body.MaxBytes)
}

// declaredLength returns the length of the body by its field; 0: there is none.
func declaredLength(fields httpforward.HeaderFields) (n int64) {
	for i := range fields.Len() {
		if name, value := fields.At(i); strings.EqualFold(string(name), "content-length") {
			n, _ = strconv.ParseInt(string(value), 10, 64) // the engine has parsed it before
		}
	}
	return n
}

// bodyTooLarge is the reply to a request whose body its server has to see, and may not see in part.
var bodyTooLarge = &route.Reply{
	Status: http.StatusRequestEntityTooLarge, Body: "Payload Too Large", Details: "request_payload_too_large", Reason: flow.PolicyDenied, Edited: true,
}

// take carries out what an answer adds to a request that it allows.
func (g *gate) take(r *httpforward.Request, e *mesh.ExtAuthz, answer *extauthz.Answer) {
	if answer.Metadata != nil {
		g.asked = answer.Metadata
	}
	if e.Reroute {
		g.chosen.again()
	}
	g.responses = append(g.responses, answer.ResponseEdits...)
	if len(answer.Parameters) > 0 && len(r.Path) > 0 && r.Path[0] == '/' {
		r.Path, g.queried, g.subject.Request = []byte(answer.Target(string(r.Path))), true, nil
	}
	if len(answer.Edits) > 0 {
		g.edits = append(g.edits, answer.Edits...)
		for i := range answer.Edits {
			g.forbid([]string{answer.Edits[i].Name})
		}
		g.edited.set(r.Fields, g.edits)
		g.subject.Request = nil // described again
	}
}

// drawKey makes draws independent of what clients can find out.
var drawKey = maphash.MakeSeed()

// draws reports whether a filter asks about a request with a seed. All calls about the request agree.
func draws(e *mesh.ExtAuthz, seed uint64) bool {
	f := e.Enabled
	if f.Numerator >= f.Denominator {
		return true
	}
	return uint32(maphash.Comparable(drawKey, drawn{e, seed})%uint64(f.Denominator)) < f.Numerator
}

type drawn struct {
	filter *mesh.ExtAuthz
	seed   uint64
}

// question copies a request for a server. Filters before this one may have changed its fields.
func (g *gate) question(r *httpforward.Request, body *mesh.AuthzBody, settings *mesh.CheckSettings) *extauthz.Question {
	q := connectionQuestion(g.role, &g.subject, r.Connection)
	fields := g.fields(r)
	request := &extauthz.Request{
		Method: string(r.Method), Scheme: string(r.Scheme), Host: string(r.Authority), Path: string(r.Path), Protocol: "HTTP/1.1", Size: -1,
	}
	if r.Protocol == flow.HTTP2 {
		request.Protocol = "HTTP/2"
	}
	for i := range fields.Len() {
		name, value := fields.At(i)
		request.Fields = append(request.Fields, route.Field{Name: string(name), Value: string(value)})
		if strings.EqualFold(string(name), "x-request-id") {
			request.ID = string(value)
		}
	}
	if body != nil {
		c := r.Collected
		request.Body, request.Partial, request.Raw = c.Bytes[:min(len(c.Bytes), int(body.MaxBytes))], !wholeIn(c, body), body.Raw
	}
	q.Request = request
	if settings != nil {
		q.Context = settings.Context
	}
	return q
}

// connectionQuestion describes a connection for a server.
func connectionQuestion(role *Role, s *authz.Subject, record *flow.Record) *extauthz.Question {
	q := &extauthz.Question{Source: record.Downstream, Destination: s.Destination, ServerName: s.ServerName, At: time.Now()}
	if len(s.Names) > 0 {
		q.Certified, q.SourceName = true, s.Names[0] // that is empty if the certificate has neither names nor a subject
		if tls := record.SecurityOf(flow.Inbound); tls != nil && tls.PeerCertificate != nil {
			q.Certificate = tls.PeerCertificate.PEM
		}
	}
	if own := role.mesh.Identity(); own != nil && s.Secured {
		q.DestinationName = own.SPIFFE
	}
	return q
}

// askAbout asks a server about a connection and waits for its answer. It returns why the connection is not allowed, and false
// if the connection has failed meanwhile.
func (c *Conn) askAbout(e *mesh.ExtAuthz, s *authz.Subject) (denial error, ok bool) {
	q := c.role.ask(e, connectionQuestion(c.role, s, c.Record), nil)
	defer q.Cancel()
	q.Notify(c.w.Wake)
	for !q.Answered() {
		if err := c.Down.Failed(); err != nil {
			return err, false
		}
		if err := c.w.Wait(time.Time{}, c.Down, nil); err != nil {
			return err, false
		}
	}
	answer := q.answer(e)
	if answer.Denied && answer.Err != nil {
		return answer.Err, true
	}
	if answer.Denied {
		return errDeniedByServer, true
	}
	return nil, true
}

var errDeniedByServer = errors.New("the server of external authorization denies it")
