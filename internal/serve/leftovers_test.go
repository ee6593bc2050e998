package serve

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/pillion-proxy/pillion/internal/extauthz"
	"github.com/pillion-proxy/pillion/internal/flow"
	"github.com/pillion-proxy/pillion/internal/httpforward"
	"github.com/pillion-proxy/pillion/internal/match"
	"github.com/pillion-proxy/pillion/internal/mesh"
	"github.com/pillion-proxy/pillion/internal/route"
)

// signer signs tokens of the issuer "me" with a secret. keys verify them.
func signer(t *testing.T) (keys []byte, sign func(payload string) string) {
	t.Helper()
	secret := []byte("a secret of at least 32 bytes, as HS256 needs")
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: secret}}})
	if err != nil {
		t.Fatal(err)
	}
	by, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: secret}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return keys, func(payload string) string {
		signed, err := by.Sign([]byte(payload))
		if err != nil {
			t.Fatal(err)
		}
		token, err := signed.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return "Bearer " + token
	}
}

// metadataOf is a condition on a text that a filter leaves.
func metadataOf(filter, value string, path ...string) mesh.Condition {
	return mesh.Condition{Kind: mesh.ConditionMetadata, Metadata: &mesh.MetadataMatcher{
		Filter: filter, Path: path, Value: mesh.ValueMatcher{Kind: mesh.ValueText, Text: exactly(value)},
	}}
}

// A policy behind the verification of tokens sees the claims of the request's own token, in metadata and in a header field: neither
// those of an earlier request of the connection nor a field of the client, also if an earlier policy has looked at the field.
func TestClaimsAreThoseOfTheRequestsOwnToken(t *testing.T) {
	keys, sign := signer(t)
	admin, other := sign(`{"iss":"me","sub":"admin"}`), sign(`{"iss":"me","sub":"other"}`)
	tokens := mesh.HTTPFilter{Name: "jwt", JWT: &mesh.JWT{Providers: []mesh.JWTProvider{{
		Name: "me", Issuer: "me", Keys: keys, Metadata: "payload", ClaimHeaders: []mesh.ClaimHeader{{Header: "x-sub", Claim: "sub"}},
	}}, Rules: []mesh.JWTRule{{Match: mesh.RouteMatch{Path: "/"}, Requires: mesh.JWTRequirement{Kind: mesh.JWTAllowMissing}}}}}
	before := mesh.HTTPFilter{Name: "before", RBAC: policyOf(mesh.Deny, onField("x-sub", exactly("nobody")), always)}
	for name, condition := range map[string]mesh.Condition{"metadata": metadataOf(jwtFilter, "admin", "payload", "sub"), "field": onField("x-sub", exactly("admin"))} {
		after := mesh.HTTPFilter{Name: "after", RBAC: policyOf(mesh.Allow, condition, always)}
		for _, filters := range [][]mesh.HTTPFilter{{tokens, after}, {before, tokens, after}} {
			g, h := new(gate), &mesh.HTTPManager{Filters: filters}
			for i, c := range []struct {
				fields fieldList
				passes bool
			}{
				{fieldList{"x-sub", "admin"}, false}, {fieldList{"authorization", admin, "x-sub", "other"}, true}, {nil, false},
				{fieldList{"authorization", admin}, true}, {fieldList{"x-sub", "admin"}, false}, {fieldList{"authorization", other, "x-sub", "admin"}, false},
			} {
				r := &httpforward.Request{Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/"), Authority: []byte("a"), Fields: c.fields}
				if _, reply, waits := g.pass(&mesh.Snapshot{}, h, r); (reply == nil) != c.passes || waits != nil {
					t.Errorf("%s, %d filters, request %d: reply %+v", name, len(filters), i+1, reply)
				}
			}
		}
	}
}

// What a server of external authorization changes about a request is what later policies see of it, also if an earlier one has
// looked at the request. Nothing of it is left for the next request.
func TestChangesOfAServerAreSeenByLaterPolicies(t *testing.T) {
	g, h := new(gate), new(mesh.HTTPManager)
	request := func() *httpforward.Request {
		return &httpforward.Request{Connection: &flow.Record{}, Method: []byte("GET"), Path: []byte("/?a=1"), Authority: []byte("a"), Fields: fieldList{"x-role", "admin"}}
	}
	role, user := policyOf(mesh.Allow, onField("x-role", exactly("admin")), always), policyOf(mesh.Allow, metadataOf(extAuthzFilter, "v", "k"), always)
	query := policyOf(mesh.Allow, onField(":path", exactly("/?a=1")), always)
	judge := func(r *httpforward.Request, want ...int) {
		t.Helper()
		for i, p := range []*mesh.RBAC{role, user, query} {
			status := http.StatusOK
			if reply := g.authorize(h, r, p); reply != nil {
				status = reply.Status
			}
			if status != want[i] {
				t.Errorf("policy %d: %d, want %d", i+1, status, want[i])
			}
		}
	}
	g.begin()
	r := request()
	judge(r, 200, 403, 200)
	g.take(r, &mesh.ExtAuthz{}, &extauthz.Answer{
		Edits: []route.Edit{route.SetField("x-role", "user")}, ResponseEdits: []route.Edit{route.SetField("x-other", "y")}, Metadata: match.Metadata{"k": "v"},
	})
	judge(r, 403, 200, 200)
	g.take(r, &mesh.ExtAuthz{}, &extauthz.Answer{Parameters: []extauthz.Parameter{{Name: "a", Value: "2"}}})
	judge(r, 403, 200, 403)
	if len(g.edits) != 1 || len(g.responses) != 1 || len(g.forbidden) != 1 || !g.queried {
		t.Errorf("edits %v, of the response %v, forbidden %q, query changed %v", g.edits, g.responses, g.forbidden, g.queried)
	}
	g.begin()
	judge(request(), 200, 403, 200)
	if len(g.edits)+len(g.responses)+len(g.forbidden) > 0 || g.queried {
		t.Errorf("left for the next request: edits %v, of the response %v, forbidden %q, query changed %v", g.edits, g.responses, g.forbidden, g.queried)
	}
}
