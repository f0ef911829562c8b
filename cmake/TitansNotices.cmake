# Collects the licences of the headers that are compiled in, for installations, archives and wheels.
#
# titans_notice(FILE PACKAGE INCLUDE): appends the licence of a Debian package to FILE. INCLUDE is the folder of its
# headers. An installation of another kind has its licence elsewhere, and FILE then names the project alone.
function(titans_notice file package include)
  get_filename_component(root ${include} ABSOLUTE)
  string(REGEX REPLACE "/include(/.*)?$" "" root ${root})
  set(text "the licence is in that project's own files\n")
  foreach(licence ${root}/share/doc/${package}/copyright /usr/share/doc/${package}/copyright)
    if(EXISTS ${licence})
      file(READ ${licence} text)
      break()
    endif()
  endforeach()
  file(APPEND ${file} "======== ${package} ========\n\n${text}\n")
endfunction()

set(TITANS_NOTICES ${PROJECT_BINARY_DIR}/NOTICES)
file(WRITE ${TITANS_NOTICES} "Parts of these projects are compiled into the libraries.\n\n")
titans_notice(${TITANS_NOTICES} nlohmann-json3-dev ${TITANS_JSON_INCLUDE})
titans_notice(${TITANS_NOTICES} libxxhash-dev ${TITANS_XXHASH_INCLUDE})
if(TITANS_HIGHWAY_INCLUDE)
  titans_notice(${TITANS_NOTICES} libhwy-dev ${TITANS_HIGHWAY_INCLUDE})
endif()
