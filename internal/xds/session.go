package xds

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// session is the state of the discovery protocol: a pure state machine that outlives the streams. Its methods return
// the requests to send, in their order.
//
// In the delta protocol an acknowledgement never changes a subscription, and a change of subscription never carries a
// nonce: the protocol allows the mixture, but istiod takes it for an error.
type session struct {
	delta bool
	node  []byte
	first bool // the next request is the first of its stream, and carries node
	types [Types]subscription
}

// subscription is what is asked for of one type.
type subscription struct {
	active bool                // it has been asked for: a new stream asks again
	wanted map[string]struct{} // names; empty for wildcard types
	asked  bool                // on this stream
	held   map[string]struct{} // names of the resources that were served and not removed
	nonce  string              // state of the world: of the last response on this stream
	accept string              // state of the world: version of the last accepted response
}

// Rejected is a resource of an update that cannot be used. The last good version of it stays in force.
type Rejected struct {
	Name   string
	Reason string
}

func newSession(delta bool, node []byte) *session {
	s := &session{delta: delta, node: node}
	for t := range s.types {
		s.types[t].wanted, s.types[t].held = map[string]struct{}{}, map[string]struct{}{}
	}
	s.types[Clusters].active = true
	return s
}

// open begins a stream: it asks again for all that was asked for before. Of a first stream that is Clusters.
func (s *session) open() []request {
	s.first = true
	var requests []request
	for t := range s.types {
		s.types[t].asked, s.types[t].nonce = false, ""
	}
	for t := range Type(Types) {
		requests = s.appendAsk(requests, t)
	}
	return requests
}

// appendAsk appends the first request for a type on this stream, if the type is active and has names to ask for.
func (s *session) appendAsk(requests []request, t Type) []request {
	sub := &s.types[t]
	if !sub.active || sub.asked || !t.Wildcard() && len(sub.wanted) == 0 {
		return requests // an empty first request would ask for everything
	}
	sub.asked = true
	r := request{typ: t}
	if s.first {
		r.node, s.first = s.node, false
	}
	if s.delta {
		r.subscribe, r.held = sorted(sub.wanted), sorted(sub.held)
		if t.singleton() {
			r.held = nil
		}
	} else {
		r.names, r.version = sorted(sub.wanted), sub.accept
	}
	return append(requests, r)
}

// receive records which resources a response adds and removes. It drops resources that are no longer asked for, and names
// of removed resources that are not held. In the state-of-the-world protocol it sets r.removed, because a wildcard response
// removes what it leaves out. It returns an error if there are too many resources; the response is not recorded then.
func (s *session) receive(r *response) error {
	sub := &s.types[r.typ]
	sub.nonce = r.nonce
	if !r.typ.Wildcard() {
		r.resources = slices.DeleteFunc(r.resources, func(resource Resource) bool {
			_, ok := sub.wanted[resource.Name]
			return !ok
		})
	}
	if !s.delta && r.typ.Wildcard() && !r.typ.singleton() {
		present := make(map[string]struct{}, len(r.resources))
		for i := range r.resources {
			present[r.resources[i].Name] = struct{}{}
		}
		for name := range sub.held {
			if _, ok := present[name]; !ok {
				r.removed = append(r.removed, name)
			}
		}
		slices.Sort(r.removed)
	}
	if len(sub.held)+len(r.resources) > maxNames && s.grown(r) > maxNames {
		return fmt.Errorf("%v: more than %d resources", r.typ, maxNames)
	}
	for i := range r.resources {
		sub.held[r.resources[i].Name] = struct{}{}
	}
	r.removed = slices.DeleteFunc(r.removed, func(name string) bool {
		_, ok := sub.held[name]
		delete(sub.held, name)
		return !ok
	})
	return nil
}

// grown returns how many resources are held after a response, unless it removes some.
func (s *session) grown(r *response) int {
	held := s.types[r.typ].held
	n := len(held)
	for i := range r.resources {
		if _, ok := held[r.resources[i].Name]; !ok {
			n++
		}
	}
	return n
}

// answer returns the acknowledgement of a response, or its rejection if resources of it were rejected.
func (s *session) answer(r *response, rejected []Rejected) request {
	sub := &s.types[r.typ]
	answer := request{typ: r.typ, nonce: r.nonce, err: describe(rejected)}
	if !s.delta {
		if answer.err == "" {
			sub.accept = r.version
		}
		answer.version, answer.names = sub.accept, sorted(sub.wanted)
	}
	return answer
}

// subscribe replaces the names that are asked for of a type, or asks for a wildcard type, without names.
func (s *session) subscribe(t Type, names []string) []request {
	sub := &s.types[t]
	sub.active = true
	if t.Wildcard() {
		return s.appendAsk(nil, t)
	}
	wanted := make(map[string]struct{}, len(names))
	for _, name := range names {
		wanted[name] = struct{}{}
	}
	if maps.Equal(wanted, sub.wanted) {
		return nil
	}
	var added, removed []string
	for name := range wanted {
		if _, ok := sub.wanted[name]; !ok {
			added = append(added, name)
		}
	}
	for name := range sub.wanted {
		if _, ok := wanted[name]; !ok {
			removed = append(removed, name)
			delete(sub.held, name)
		}
	}
	slices.Sort(added)
	slices.Sort(removed)
	sub.wanted = wanted
	if !sub.asked {
		return s.appendAsk(nil, t)
	}
	if s.delta {
		return []request{{typ: t, subscribe: added, unsubscribe: removed}}
	}
	return []request{{typ: t, names: sorted(wanted), version: sub.accept, nonce: sub.nonce}}
}

// maxReasons bounds the text of a rejection, in bytes. istiod keeps it and shows it in proxy-status.
const maxReasons = 4 << 10

// describe returns the text of a rejection, with the name of each resource. It is empty if rejected is.
func describe(rejected []Rejected) string {
	var b strings.Builder
	for i, r := range rejected {
		text := r.Reason
		if r.Name != "" {
			text = r.Name + ": " + text
		}
		if b.Len()+len(text) > maxReasons {
			if i == 0 {
				b.WriteString(text[:maxReasons])
			}
			b.WriteString("; and more")
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(text)
	}
	return strings.ToValidUTF8(b.String(), "\uFFFD") // a character may have been cut
}
