package mesh

import "iter"

// Row is what becomes of one field of one type of message.
type Row struct {
	Message   string // full name, such as "envoy.config.cluster.v3.Cluster"
	Number    int
	Field     string
	Treatment string // "decoded", "ignored", or the class of the finding that its presence is
	Once      bool   // a message of which another occurrence is a finding
}

// tables has all tables whose messages have a name.
var tables = []*message{
	&clusterFields,
	&edsFields,
	&breakersFields,
	&thresholdsFields,
	&outlierFields,
	&bindFields,
	&extraSourceFields,
	&ringFields,
	&maglevFields,
	&leastRequestFields,
	&roundRobinFields,
	&slowStartFields,
	&commonBalancingFields,
	&connectionFields,
	&keepaliveFields,
	&filterFields,
	&assignmentFields,
	&localityFields,
	&placeFields,
	&lbEndpointFields,
	&hostFields,
	&additionalFields,
	&addressFields,
	&socketAddressFields,
	&transportMatchFields,
	&transportFields,
	&upstreamTLSFields,
	&commonTLSFields,
	&tlsParametersFields,
	&combinedFields,
	&validationFields,
	&secretFields,
	&stringMatcherFields,
	&regexFields,
	&protocolOptionsFields,
	&commonHTTPFields,
	&explicitHTTPFields,
	&downstreamHTTPFields,
	&http1Fields,
	&http2Fields,
	&keepaliveSettingsFields,
	&durationFields,
	&metadataFields,
	&headerMatcherFields,
	&rangeFields,
	&fractionFields,
	&runtimeFractionFields,
	&dataSourceFields,
	&metadataMatcherFields,
	&pathSegmentFields,
	&valueMatcherFields,
	&nullMatchFields,
	&listMatcherFields,
	&orMatcherFields,
	&routesFields,
	&virtualHostFields,
	&routeFields,
	&decoratorFields,
	&routeMatchFields,
	&queryMatcherFields,
	&forwardFields,
	&streamDurationFields,
	&weightedClustersFields,
	&clusterWeightFields,
	&rewriteFields,
	&mirrorFields,
	&hashPolicyFields,
	&hashHeaderFields,
	&hashCookieFields,
	&hashAttributeFields,
	&hashConnectionFields,
	&hashQueryFields,
	&redirectFields,
	&responseFields,
	&retryFields,
	&backOffFields,
	&retryPredicateFields,
	&retryPriorityFields,
	&previousPrioritiesFields,
	&headerOptionFields,
	&headerValueFields,
	&filterConfigFields,
	&faultFields,
	&faultDelayFields,
	&faultAbortFields,
	&corsFields,
	&secretResourceFields,
	&certificateFields,
	&rootsFields,
	&namesFields,
	&nameFields,
	&proxyConfigFields,
}

var treatments = [...]string{decoded: "decoded", once: "decoded", ignored: "ignored", cosmetic: "cosmetic", traffic: "traffic", security: "security"}

// Rows yields the rows of all tables.
func Rows() iter.Seq[Row] {
	return func(yield func(Row) bool) {
		for _, table := range tables {
			for number, field := range table.fields {
				if field.is != unknown && !yield(Row{table.name, number, field.name, treatments[field.is], field.is == once}) {
					return
				}
			}
		}
	}
}
