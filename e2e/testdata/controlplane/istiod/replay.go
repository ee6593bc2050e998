package main

import (
	"fmt"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/pillion-proxy/pillion/internal/controlplane/pushtest"
	"github.com/pillion-proxy/pillion/internal/xds"
)

// replay serves a recorded push: each type is answered once on each stream, when it is first requested.
type replay struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	updates []xds.Update
}

func newReplay(push string) (*replay, error) {
	switch push {
	case "sidecar":
		return &replay{updates: pushtest.Sidecar()}, nil
	case "thousand":
		return &replay{updates: pushtest.Thousand()}, nil
	}
	return nil, fmt.Errorf("-push %q, want sidecar or thousand", push)
}

// DeltaAggregatedResources implements the service.
func (r *replay) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	sent := map[string]bool{}
	for {
		request, err := stream.Recv()
		if err != nil {
			return err
		}
		if sent[request.TypeUrl] {
			continue
		}
		sent[request.TypeUrl] = true
		for i := range r.updates {
			if u := &r.updates[i]; u.Type.URL() == request.TypeUrl {
				if err := stream.Send(response(u, fmt.Sprint(i+1))); err != nil {
					return err
				}
			}
		}
	}
}

func response(u *xds.Update, nonce string) *discovery.DeltaDiscoveryResponse {
	d := &discovery.DeltaDiscoveryResponse{TypeUrl: u.Type.URL(), Nonce: nonce}
	for _, r := range u.Resources {
		d.Resources = append(d.Resources, &discovery.Resource{Name: r.Name, Resource: &anypb.Any{TypeUrl: r.TypeURL, Value: r.Value}})
	}
	return d
}
